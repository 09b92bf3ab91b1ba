"""What follows a run, however it ends: the metrics of one that failed, and the notice to a web hook."""

import logging
import threading
from collections.abc import Callable

from catdog import storage
from catdog.config import PredictConfig
from catdog.errors import ClaimLostError, OutputClaimedError
from catdog.inference import morning, notice, openmetrics
from catdog.inference.books import RunRecord
from catdog.inference.draining import Drain
from catdog.provenance import one_line

logger = logging.getLogger(__name__)

_PATIENCE_S = 10.0
"""How long the metrics of a run that failed may take: its storage may be what has failed."""


def followed(config: PredictConfig, run: Callable[[PredictConfig], tuple[RunRecord, Drain]]) -> RunRecord:
    """Run, and tell a hook how it ended, where there is one, and the metrics of the output, if the run failed.

    A run that a signal has drained has its record. Then the signal does what it would have done.
    """
    url = notice.url_of(config)
    try:
        record, drain = run(config)
    except BaseException as error:
        with morning.never_failing("What follows a failure"):
            failed(config, error)
        raise
    if url is not None:
        with morning.never_failing("The notice"):
            notice.tell_end(url, record)
    drain.pass_on()
    return record


def failed(config: PredictConfig, error: BaseException) -> None:
    """What follows a run that failed."""
    if not isinstance(error, (OutputClaimedError, ClaimLostError)):  # then the metrics are another run's
        _publish_failure(storage.absolute(config.output))
    url = notice.url_of(config)
    if url is not None:
        notice.tell_failure(url, config, error)


def _publish_failure(output: str) -> None:
    def publish() -> None:
        try:
            openmetrics.publish(output, None)
        except Exception as error:
            logger.warning("The metrics could not be written: %s", one_line(error))

    writer = threading.Thread(target=publish, name="catdog-metrics", daemon=True)
    writer.start()
    writer.join(_PATIENCE_S)
