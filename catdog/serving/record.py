"""What `catdog serve` has done when it ends."""

from dataclasses import dataclass

from catdog.records import Record, counted, plural


@dataclass(frozen=True, kw_only=True)
class ServeRecord(Record):
    """What was served, from the start to the end."""

    command: str = "serve"
    url: str
    executor: str
    model_id: str
    """Of the last model."""

    num_requests: int | None
    """Requests for labels. None, as the next two, with ray: each replica counts for itself."""

    labels: dict[str, int] | None
    """`cat` or `dog` → number of images."""

    errors: dict[str, int] | None
    """Error code → number of images."""

    num_cut_off: int
    """Requests that were still under way when `--drain-s` was over."""

    duration_s: float

    def summary(self) -> list[str]:
        """What was labelled."""
        if self.num_requests is None or self.labels is None or self.errors is None:
            return [f"Served for {self.duration_s:,.0f} s ({self.executor})."]
        num_images = sum(self.labels.values()) + sum(self.errors.values())
        return [
            f"Served {plural(num_images, 'image')} in {plural(self.num_requests, 'request')} "
            f"in {self.duration_s:,.0f} s ({self.executor}).",
            *([f"  labels   {counted(self.labels)}"] if self.labels else []),
            *([f"  errors   {counted(self.errors)}"] if self.errors else []),
        ]

    def complaint(self) -> str | None:
        """Of requests that were cut off."""
        if not self.num_cut_off:
            return None
        return f"every request must end within --drain-s. Received: {plural(self.num_cut_off, 'request')} that did not"
