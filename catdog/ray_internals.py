"""The private things of Ray that catdog uses. No other module of the package names any.

Ray may move a private name in any version. Where one is gone, catdog does without: it logs one warning, and Ray behaves
as it does for everybody else. `tests/test_ray_internals.py` says which name has moved.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from ray.train.tensorflow import TensorflowTrainer

logger = logging.getLogger(__name__)

SIGINT_HANDLER: Final = "ray.train.tensorflow.TensorflowTrainer._register_sigint_handler"
DEFAULT_CALLBACKS: Final = "ray.train.tensorflow.TensorflowTrainer._create_default_callbacks"
DATASETS_CALLBACK: Final = "ray.train.v2._internal.callbacks.datasets.DatasetsCallback"
CLEANER_CALLBACK: Final = "ray.train.v2._internal.callbacks.placement_group_callback.PlacementGroupCleanerCallback"
DASHBOARD_URL: Final = "ray._private.worker.get_dashboard_url"
HEALTH_CHECK_ERROR: Final = "ray.train.v2._internal.exceptions.WorkerHealthCheckFailedError"
USER_ERROR: Final = "ray.train.v2._internal.exceptions.UserExceptionWithTraceback"
TRAIN_CONTEXT: Final = "ray.train.v2._internal.execution.context.get_train_context"
GCS_PING: Final = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""The remote procedure by which the head of a cluster says that it lives. It needs no argument."""

TOKENS: Final = "ray._raylet.AuthenticationTokenLoader"
PROGRESS_LOGGER: Final = "ray.data._internal.progress.logger"
FREE_RESOURCES: Final = "ray._private.state.available_resources_per_node"

_OUT_OF_MEMORY: Final = re.compile("running low on memory|OutOfMemoryError")
"""Words of Ray's memory monitor. (Of every killed process Ray says that the OOM killer may have done it.)"""

NAMES: Final = (
    SIGINT_HANDLER,
    DEFAULT_CALLBACKS,
    DATASETS_CALLBACK,
    CLEANER_CALLBACK,
    DASHBOARD_URL,
    HEALTH_CHECK_ERROR,
    USER_ERROR,
    TRAIN_CONTEXT,
    TOKENS,
    PROGRESS_LOGGER,
    FREE_RESOURCES,
)
"""Every private name that this module uses."""


@functools.cache
def find(name: str) -> Any | None:
    """What a dotted name of Ray stands for; None, and one warning in the log, where this version has no such name."""
    module, _, attribute = name.rpartition(".")
    holder: Any
    try:
        holder = importlib.import_module(module)
    except ImportError:  # the name of a method: what holds it is a class
        holder = find(module) if module.rpartition(".")[2][:1].isupper() else None
    found = getattr(holder, attribute, None)
    if found is None:
        import ray

        logger.warning("ray %s has no %s: catdog does without", ray.__version__, name)
    return found


def tensorflow_trainer(*arguments: Any, **options: Any) -> TensorflowTrainer:
    """A `ray.train.tensorflow.TensorflowTrainer` that leaves Ctrl-C alone and starts no process that has nothing to do.

    Args:
        arguments: as of Ray's class.
        options: as of Ray's class.
    """
    from ray.train.tensorflow import TensorflowTrainer

    left_out = _idle_callbacks()

    class LeanTrainer(TensorflowTrainer):  # type: ignore[misc]
        def _register_sigint_handler(self, controller: object) -> None:
            """Leave Ctrl-C to the caller's handler: Ray's own would end the process with exit code 1."""

        def _create_default_callbacks(self) -> list[object]:
            return [each for each in super()._create_default_callbacks() if not isinstance(each, left_out)]

    # Ray calls a method by its name: where the name is gone, ours is never called.
    find(SIGINT_HANDLER)
    return (LeanTrainer if find(DEFAULT_CALLBACKS) else TensorflowTrainer)(*arguments, **options)


def _idle_callbacks() -> tuple[type, ...]:
    """The callbacks of Ray Train that have nothing to do here. Each of them would start a process.

    One feeds Ray datasets, and there are none. The other asks Ray's dashboard whether the controller still lives: where
    there is no dashboard, it waits ten seconds for an answer before a group of workers can end.
    """
    idle = [find(DATASETS_CALLBACK)]
    get_dashboard_url = find(DASHBOARD_URL)
    if get_dashboard_url is not None and not get_dashboard_url():
        idle.append(find(CLEANER_CALLBACK))
    return tuple(callback for callback in idle if callback is not None)


def is_lost_worker(failure: Exception) -> bool:
    """Whether a training worker failed because its process is gone."""
    from ray.exceptions import RayActorError

    return isinstance(getattr(failure, "health_check_failure", None), RayActorError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Ray killed a process of a failed group of workers because its node ran out of memory."""
    from ray.exceptions import OutOfMemoryError

    failures = [error, *getattr(error, "worker_failures", {}).values()]
    chain = [
        cause
        for failure in failures
        for each in (failure, getattr(failure, "health_check_failure", None))
        if each is not None
        for cause in causes(each)
    ]
    return any(isinstance(cause, OutOfMemoryError) or _OUT_OF_MEMORY.search(str(cause)) for cause in chain)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error that a worker raised, out of the ones that Ray wraps it in: from the outermost to the innermost."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = getattr(cause, "_base_exc", None) or getattr(cause, "cause", None) or cause.__cause__


def train_controller() -> Any:
    """The actor that controls the group of the training worker that calls this. For tests, which kill it."""
    get_train_context = find(TRAIN_CONTEXT)
    if get_train_context is None:
        raise LookupError(f"ray must have {TRAIN_CONTEXT}")
    return get_train_context().controller_actor


def ping(address: str, timeout_s: float) -> None:
    """Check that the head of a Ray cluster answers at an address. Ray itself would wait for minutes.

    Args:
        address: HOST:PORT, or ray://HOST:PORT, where it is enough that something speaks gRPC.
        timeout_s: how long to wait.

    Raises:
        OSError: nothing answers in time, or something that is no Ray, or a Ray that does not know this process's token.
    """
    import grpc  # type: ignore[import-untyped]

    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # whoever listens wants the certificate that Ray has
    # A proxy for the web knows nothing of the cluster.
    options = [("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]
    with grpc.insecure_channel(address.removeprefix("ray://"), options=options) as channel:
        try:
            channel.unary_unary(GCS_PING)(b"", timeout=timeout_s, wait_for_ready=False, metadata=_token_header())
        except grpc.RpcError as error:
            code = error.code()
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise OSError(f"what listens there gives no answer as Ray does ({code.name})") from error
            if code == grpc.StatusCode.UNIMPLEMENTED and not address.startswith("ray://"):
                raise OSError("what listens there is not the head of a Ray cluster") from error
            if code == grpc.StatusCode.UNAUTHENTICATED:
                raise OSError(
                    "that cluster wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the token of the "
                    "cluster unless it lies in ~/.ray/auth_token"
                ) from error
            # Any other refusal is an answer of Ray's.


def _token_header() -> tuple[tuple[str, str], ...]:
    """The token by which Ray knows its own, where `RAY_AUTH_MODE` says that there is one.

    Raises:
        OSError: there is none.
    """
    from ray.exceptions import AuthenticationError

    loader = find(TOKENS)
    try:
        return () if loader is None else tuple(loader.instance().get_token_for_http_header().items())
    except AuthenticationError as error:
        raise OSError(str(error)) from error


def quiet_ray_data(context: Any) -> None:
    """Keep Ray Data from drawing progress bars, and from logging what is no warning.

    Args:
        context: what `ray.data.DataContext.get_current()` returns, before a dataset is made.
    """
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    progress_logger = find(PROGRESS_LOGGER)
    if progress_logger is not None:  # it would warn that there are no progress bars
        progress_logger.setLevel(logging.ERROR)


def all_resources() -> list[tuple[int, int]]:
    """Number of CPUs, and number of GPUs, of each node of the cluster."""
    import ray

    return [_cpus_and_gpus(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def free_resources() -> list[tuple[int, int]]:
    """Number of CPUs, and number of GPUs, that are free on each node: all, where this version of Ray does not tell."""
    available = find(FREE_RESOURCES)
    return all_resources() if available is None else [_cpus_and_gpus(node) for node in available().values()]


def _cpus_and_gpus(resources: dict[str, float]) -> tuple[int, int]:
    return int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
