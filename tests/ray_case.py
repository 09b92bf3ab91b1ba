"""A small Ray of its own for a test module. (PYTEST_DONT_REWRITE: no asserts here.)"""

import contextlib
from collections.abc import Iterator

import ray

from catdog import scratch
from catdog.ray_session import _MAX_BASE_BYTES


@contextlib.contextmanager
def small_ray(num_cpus: int) -> Iterator[None]:
    """Run an embedded Ray of so many logical CPUs, whose files lie in a directory of its own."""
    with scratch.directory("ray", parent=scratch.short_base(_MAX_BASE_BYTES)) as directory:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=directory,
        )
        yield
        ray.shutdown()
