"""What the service counts, in Prometheus's text format. Each process counts for itself."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0

MEDIA_TYPE: Final = CONTENT_TYPE_PLAIN_1_0_0

_LATENCIES_S: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCH_SIZES: Final = (1, 2, 3, 4, 8, 16, 32, 64)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series of each, which nobody asks for


class Metrics:
    """The counters of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "catdog_requests", "Requests that were answered.", ["route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "catdog_request_seconds",
            "From the head of a request to the end of its answer.",
            ["route"],
            buckets=_LATENCIES_S,
            registry=self.registry,
        )
        self.images = Counter("catdog_images", "Images that got a label.", ["label"], registry=self.registry)
        self.reviews = Counter(
            "catdog_images_needing_review", "Of these, a person should look at.", registry=self.registry
        )
        self.errors = Counter("catdog_image_errors", "Images that got none.", ["code"], registry=self.registry)
        self.batches = Histogram(
            "catdog_batch_images",
            "Images that the model was given at a time.",
            buckets=_BATCH_SIZES,
            registry=self.registry,
        )
        self.waiting = Gauge("catdog_queue_images", "Images that wait, or are being labelled.", registry=self.registry)
        self.held = Gauge("catdog_held_bytes", "Encoded bytes that are held.", registry=self.registry)
        self.reloads = Counter(
            "catdog_reloads", "Models that were put in place of others.", ["outcome"], registry=self.registry
        )
        self.model = Gauge(
            "catdog_model_info", "Always 1; the labels name the model.", ["model_id"], registry=self.registry
        )

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)

    def counts(self, counter: Counter) -> dict[str, int]:
        """The counts of a counter with one label, by that label."""
        samples = (
            sample for metric in counter.collect() for sample in metric.samples if sample.name.endswith("_total")
        )
        return {next(iter(sample.labels.values())): int(sample.value) for sample in samples}
