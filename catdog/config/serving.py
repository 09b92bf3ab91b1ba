"""The configuration of `catdog serve`."""

from dataclasses import dataclass

from catdog.config import checks
from catdog.config.choices import EngineName, Executor
from catdog.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Label photographs over HTTP: a page to drop them on, and an API. It runs until it is told to end."""

    model: str | None = None
    """Model bundle to label with, written by `catdog train`. When another bundle takes its place there, the service
    takes that one. The default is the model that comes with catdog."""

    host: str = "127.0.0.1"
    """Address to listen on. The default can be reached from this machine only; 0.0.0.0 stands for all addresses."""

    port: int = 8000
    """Port to listen on; 0 for one that is free."""

    executor: Executor = "auto"
    """Where to label: inline (in this process, without Ray) or ray (in replicas of a Ray Serve deployment). auto takes
    ray where there is a cluster, else inline."""

    engine: EngineName = "auto"
    """Library that computes the model: openvino (in int8 if that was found to be as right, see the model's card),
    openvino-float, or tensorflow. auto takes openvino on CPUs and tensorflow on GPUs."""

    use_gpu: bool = False
    """Compute the model on a GPU: this machine's (inline), or one for each replica (ray). Without this flag no GPU is
    used."""

    num_workers: int | None = None
    """Number of threads of each process that decode and score. The default is one per core (inline), or one per CPU of
    the replica (ray)."""

    num_replicas: int = 1
    """Number of Ray actors that label (ray). Each loads the model."""

    cpus_per_replica: int = 2
    """Number of CPUs of each Ray actor (ray)."""

    max_files: int = 100
    """Largest number of files in a request."""

    max_file_mib: int = 32
    """Largest size of a file, in MiB."""

    max_request_mib: int = 512
    """Largest size of a request, in MiB. Its files are labelled while the rest of it arrives."""

    max_queue: int = 256
    """Number of images that may wait, per process. While it is reached, requests are refused with status 429."""

    timeout_s: float = 30.0
    """Seconds that a client may stay silent, or fall behind 16 kB/s, while it sends a request."""

    drain_s: float = 30.0
    """Seconds that requests under way get to end when the service is told to end (SIGTERM, Ctrl-C). New ones are
    refused with status 503 meanwhile."""

    reload_s: float = 30.0
    """Seconds between two looks at whether another bundle has taken the place of the model; 0 for none."""

    token_file: str | None = None
    """File that holds the token which every request for a label must bring (`Authorization: Bearer TOKEN`). The default
    is the environment variable CATDOG_TOKEN; if that is not set either, everybody may ask."""

    ray_address: str | None = None
    """Address of the Ray cluster to run on. The default is `RAY_ADDRESS`, else a Ray embedded on this machine."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.is_url(self, "model", "host", "token_file")
        checks.at_least(self, 1, "num_workers", "num_replicas", "cpus_per_replica")
        checks.at_least(self, 1, "max_files", "max_file_mib", "max_request_mib", "max_queue")
        checks.at_least(self, 0, "port", "drain_s", "reload_s")
        checks.in_order(self, "max_file_mib", "max_request_mib")
        checks.require(self.port < 2**16, "--port must be less than 65536", self.port)
        checks.require(self.timeout_s > 0, "--timeout-s must be above 0", self.timeout_s)
        if self.executor == "inline" and self.ray_address is not None:
            raise UsageError(
                "--ray-address needs --executor ray or auto. "
                f"Received: --executor=inline --ray-address={self.ray_address}"
            )
