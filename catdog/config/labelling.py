"""The configurations of the jobs that label images: `catdog evaluate` and `catdog predict`."""

from dataclasses import dataclass, field
from typing import Final, Literal

from catdog.config import checks
from catdog.config.choices import EngineName, Executor, Split
from catdog.errors import UsageError

BEGIN_VARIABLE: Final = "CATDOG_BEGIN"
"""The environment variable that says when a job began whose command was started again, in seconds since 1970. So a
deadline that came in between is not taken for that of the next day. `nightly.sh` sets it, and the process that starts
one that labels anew after its death."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure how right a model is on a labelled split of a dataset, and draw it."""

    data: str
    """Dataset to evaluate on, written by `catdog prepare`."""

    output: str
    """Directory to write metrics.json and the figures to. An earlier evaluation there is replaced."""

    model: str | None = None
    """Model bundle to evaluate, written by `catdog train`. The default is the model that comes with catdog."""

    split: Split = "test"
    """Split of the dataset to evaluate on."""

    batch_size: int = 64
    """Images that a thread decodes and scores at a time."""

    engine: EngineName = "auto"
    """Library that computes the model: openvino (in int8 if that was found to be as right, see the model's card),
    openvino-float, or tensorflow. auto takes openvino on CPUs and tensorflow on GPUs."""

    use_gpu: bool = False
    """Compute the model on this machine's GPU. Without this flag no GPU is used."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.is_url(self, "data", "output", "model")
        checks.at_least(self, 1, "batch_size")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Label a collection of images, and write Parquet predictions. Only what is new or changed is labelled."""

    images: tuple[str, ...] | str
    """Where the images are: a directory or prefix (read recursively), a glob (in quotes), one file, a `.zip` or `.tar`
    (read in place), or a manifest: a table that names the images or holds them, as CSV, TSV, JSON lines or Parquet, or
    a .txt with one path a line. Several places may be given."""

    output: str
    """Directory to write the predictions to. It must be empty, or hold predictions, to which the new ones are added."""

    include: tuple[str, ...] = ()
    """Globs (in quotes) of the files to label, such as '*.{jpg,png}' or 'cameras/3/**': a glob with a slash is compared
    with the path below --images, one without a slash with the file's name. The default is all files. What is neither by
    its name nor by its first bytes an image is skipped in any case."""

    exclude: tuple[str, ...] = ()
    """Globs (in quotes) of the files not to label, as for --include. A name with a slash at its end stands for all that
    lies below."""

    uri_column: str | None = None
    """Column of a manifest that names the images, or holds them. The default is the one named uri, path, file,
    file_name, filename, filepath, image or url."""

    model: str | None = None
    """Model bundle to label with, written by `catdog train`. The default is the model that comes with catdog."""

    executor: Executor = "auto"
    """Where to label: inline (on all cores of this machine, without Ray) or ray (as a Ray Data job). auto takes ray
    where there is a cluster, else inline."""

    engine: EngineName = "auto"
    """Library that computes the model: openvino (in int8 if that was found to be as right, see the model's card),
    openvino-float, or tensorflow. auto takes openvino on CPUs and tensorflow on GPUs."""

    batch_size: int = 64
    """Images that a thread decodes and scores at a time."""

    use_gpu: bool = False
    """Compute the model on a GPU: this machine's (inline), or one for each worker (ray). Without this flag no GPU is
    used."""

    num_workers: int | None = None
    """Number of decoding threads (inline), or largest number of Ray actors (ray). The default is one per core, and with
    ray as many actors as the cluster has room for at the time."""

    cpus_per_worker: int | None = None
    """Number of CPUs of each Ray actor (ray), whose threads share one model in memory. The default is as many as the
    nodes have, but at most 8."""

    max_failed_fraction: float = 0.1
    """Exit with code 3 if more than this share of the images that this run labelled failed, and at least
    --min-failures of them. 0 allows no failure at all."""

    min_failures: int = 5
    """Number of failures below which a run counts as well, however few images were new."""

    allow_empty: bool = False
    """Exit with code 0 if there is nothing at --images, or no image, as on a night without new photographs. Without
    this flag that is an error, because a wrong path or a lost mount looks the same."""

    retry_errors: bool = False
    """Also label again the images that failed in earlier runs. Those that were not there, or were denied, are tried
    again in every run."""

    deadline: str | None = None
    """Time of day, such as 06:00 (of the clock and time zone of this machine), at which no further images are begun.
    Those that were begun are published, and the next run does the rest. It is the next such time after the start."""

    max_images: int | None = None
    """Largest number of images to label in this run. The next run does the rest."""

    ray_address: str | None = None
    """Address of the Ray cluster to run on. The default is `RAY_ADDRESS`, else a Ray embedded on this machine."""

    notify: str | None = field(default=None, metadata={"secret": True})
    """Web hook, as Slack's, to tell how the run ended, also if it failed. The default is the environment variable
    `CATDOG_NOTIFY_URL`, where nobody sees it. A hook that fails is a warning."""

    def __post_init__(self) -> None:
        """Validate. One place of images that comes as a text becomes a tuple of one."""
        if isinstance(self.images, str):
            object.__setattr__(self, "images", (self.images,))
        checks.are_urls(self, "images")
        checks.are_globs(self, "include", "exclude")
        checks.is_url(self, "output", "model")
        checks.at_least(self, 1, "batch_size", "num_workers", "cpus_per_worker", "min_failures", "max_images")
        checks.is_time_of_day(self, "deadline")
        checks.is_fraction(self, "max_failed_fraction")
        is_hook = self.notify is None or self.notify.startswith(("http://", "https://"))
        checks.require(is_hook, "--notify must be a URL of http or https", "***")
        if self.executor == "inline" and self.ray_address is not None:
            raise UsageError(
                "--ray-address needs --executor ray or auto. "
                f"Received: --executor=inline --ray-address={self.ray_address}"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """The places of the images."""
        return (self.images,) if isinstance(self.images, str) else self.images


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Recount everything that an output of `catdog predict` holds, and name every difference from its run records."""

    output: str = field(metadata={"positional": True})
    """Directory of the predictions."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.require(bool(self.output.strip()), "OUTPUT must be a path or a URL", repr(self.output))


@dataclass(frozen=True, kw_only=True)
class CompactConfig:
    """Merge the small part files of an output of `catdog predict` into large ones, while readers read and runs run."""

    output: str = field(metadata={"positional": True})
    """Directory of the predictions."""

    target_rows: int = 1_000_000
    """Number of rows of a merged part file: a million take some 128 MB. Part files with at least half as many are left
    as they are."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.require(bool(self.output.strip()), "OUTPUT must be a path or a URL", repr(self.output))
        checks.at_least(self, 1, "target_rows")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare two outputs of `catdog predict`, or two models in one: flips, shifts of confidence, new errors."""

    before: str = field(metadata={"positional": True})
    """Directory of the predictions to compare with."""

    after: str | None = field(default=None, metadata={"positional": True})
    """Directory of the other predictions. The default is to compare two models in the same directory."""

    model_before: str | None = None
    """Beginning of the id of the model whose rows of BEFORE are taken. The default is the model that labelled last; in
    one directory, the last one but --model-after."""

    model_after: str | None = None
    """Beginning of the id of the model whose rows of AFTER are taken. The default is the model that labelled last."""

    by: Literal["uri", "image_id"] = "uri"
    """What makes two rows rows of one image: uri (its name), or image_id (its bytes, wherever they lie)."""

    output: str | None = None
    """HTML file to write, with photographs. The default is to write none."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.require(bool(self.before.strip()), "BEFORE must be a path or a URL", repr(self.before))
        is_place = self.after is None or bool(self.after.strip())
        checks.require(is_place, "AFTER must be a path or a URL", repr(self.after))
        checks.is_url(self, "output")
        is_page = self.output is None or self.output.endswith((".html", ".htm"))
        checks.require(is_page, "--output must be a file whose name ends with .html", self.output)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Give an older model bundle the files of its engines. It gets another id: every image is labelled anew with it."""

    model: str = field(metadata={"positional": True})
    """Model bundle to convert."""

    data: str | None = None
    """Dataset that the model was trained on. Its splits train and val are needed to make and to judge the int8 model;
    without them there is none."""

    output: str | None = None
    """Directory to write the converted bundle to. The default is to convert it where it is."""

    def __post_init__(self) -> None:
        """Validate."""
        checks.require(bool(self.model.strip()), "MODEL must be a path or a URL", repr(self.model))
        checks.is_url(self, "data", "output")
