"""The configuration of `catdog prepare`."""

from dataclasses import dataclass
from typing import Literal

from catdog.config import checks
from catdog.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn labelled photographs into a dataset: check them, find duplicates, split them, and write Parquet shards."""

    images: tuple[str, ...] | str
    """Where the photographs are: a directory or prefix (read recursively), a glob (in quotes), one file, a `.zip` or
    `.tar` (read in place), or a manifest: a table that names the images or holds them, as CSV, TSV, JSON lines or
    Parquet, or a .txt with one path a line. Several places may be given."""

    output: str
    """Directory to write the dataset to. It must be empty, or hold a dataset of the same configuration."""

    include: tuple[str, ...] = ()
    """Globs (in quotes) of the files to take, such as '*.{jpg,png}' or 'train.zip/**': a glob with a slash is compared
    with the path below --images, one without a slash with the file's name. The default is all files."""

    exclude: tuple[str, ...] = ()
    """Globs (in quotes) of the files not to take, as for --include. A name with a slash at its end stands for all that
    lies below."""

    labels: str = "auto"
    """How to tell cats from dogs: auto, folder, prefix, or a CSV or Parquet file with the columns `uri` and `label`.
    folder takes the parent folder's name (`cat`, `Dogs`), prefix the beginning of the file name (`cat.123.jpg`); auto
    tries the folder first, then the prefix."""

    val_fraction: float = 0.1
    """Share of the photographs to validate with, from 0 to 1. Duplicates count as one photograph."""

    test_fraction: float = 0.1
    """Share of the photographs to test with, from 0 to 1. Duplicates count as one photograph."""

    seed: int = 0
    """Number that decides which photograph goes to which split. Another number gives another split."""

    split: Literal["auto", "folders", "random"] = "auto"
    """How to split the photographs: folders keeps the split that folders named train, val (validation) and test name,
    and draws from train what no folder names; random draws all splits; auto is folders if there are such folders, else
    random."""

    near_duplicates: Literal["keep", "group", "reject"] = "group"
    """What to do with photographs that look the same: group puts them in the same split, reject keeps one of them, and
    both reject those that are labelled both cat and dog; keep treats each as a photograph of its own."""

    extends: str | None = None
    """A dataset that was prepared from some of these photographs. Each photograph that is in it keeps its split, and
    near-duplicates of one of them go to its split."""

    ray_address: str | None = None
    """Address of the Ray cluster to run on. The default is `RAY_ADDRESS`, else a Ray embedded on this machine."""

    def __post_init__(self) -> None:
        """Validate. A single place of images becomes a text."""
        if isinstance(self.images, tuple):
            checks.are_urls(self, "images")
        if len(self.sources) == 1:
            object.__setattr__(self, "images", self.sources[0])
            checks.is_url(self, "images")
        checks.are_globs(self, "include", "exclude")
        checks.is_url(self, "output", "labels", "extends")
        checks.is_fraction(self, "val_fraction", "test_fraction")
        if self.val_fraction + self.test_fraction >= 1:
            raise UsageError(
                "--val-fraction and --test-fraction must leave a share for training. "
                f"Received: --val-fraction={self.val_fraction} --test-fraction={self.test_fraction}"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """The places of the photographs."""
        return (self.images,) if isinstance(self.images, str) else self.images
