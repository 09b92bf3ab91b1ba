"""The API takes what its description lets a client send, and much else, and never fails: fuzzed with schemathesis."""

import contextlib
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from inference_case import encoded_drawings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance
from serving_case import running

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_nothing_makes_it_fail(model: str, mode: GenerationMode) -> None:
    with running(model, max_file_mib=1, max_request_mib=2) as served:
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        operations: list[Any] = [found.ok() for found in schema.get_all_operations()]  # type: ignore[union-attr]
        assert len(operations) >= 10
        for operation in operations:
            fuzz(operation, mode)
        requests = served.service.metrics.requests.collect()
        asked = {sample.labels["route"] for metric in requests for sample in metric.samples}
        assert asked >= {operation.path for operation in operations} or mode is GenerationMode.NEGATIVE
        assert served.client.post("/v1/predict", content=encoded_drawings(1)[0]).status_code == 200
        assert served.service._num_held_bytes == served.service._num_waiting == 0


def fuzz(operation: Any, mode: GenerationMode) -> None:
    """Send requests that fit the description of an operation, or that do not."""
    try:
        strategy = operation.as_strategy(generation_mode=mode)
    except schemathesis.errors.SchemathesisError:
        return

    @given(case=strategy)
    @settings(
        max_examples=20,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: Any) -> None:
        case.call_and_validate(checks=[not_a_server_error, content_type_conformance, response_schema_conformance])

    with contextlib.suppress(Unsatisfiable):  # an operation without parameters takes no wrong ones
        send()
