"""Joining a Ray cluster that cannot be reached."""

import pytest

from catdog.errors import UsageError
from catdog.ray_session import connect

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:8265"])
def test_a_cluster_that_cannot_be_reached_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    rule = r"^--ray-address or RAY_ADDRESS must name a Ray cluster that can be reached: HOST:6379, or auto\. Received: "
    with pytest.raises(UsageError, match=rule + address), connect(None):
        pass
