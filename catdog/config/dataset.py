"""The configuration of `catdog prepare`."""

from dataclasses import dataclass
from typing import Literal

from catdog.config import checks
from catdog.errors import UsageError
from catdog.schema import CLASS_NAMES


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
    """How to tell cats from dogs: auto, folder, prefix, or a table (CSV, TSV, JSON lines or Parquet) of names and
    labels. folder takes the name of the nearest folder that is a class (`cat`, `Dogs`), prefix the beginning of the
    file name (`cat.123.jpg`); auto takes the label in the manifest, if --images is one that has labels, else the
    folder, else the prefix."""

    class_names: tuple[str, ...] = ()
    """Other names of the classes, of folders, files and labels: cat=kitten,n02123045 dog=puppy,n02084071. In a table,
    0 is cat and 1 is dog, unless this says otherwise: cat=1 dog=0."""

    uri_column: str | None = None
    """Column of the manifest or of the table of labels that names the images, or holds them. The default is the one
    named uri, path, file, file_name, filename, filepath, image or url."""

    label_column: str | None = None
    """Column that holds the labels. The default is the one named label, labels, class or category."""

    split_column: str | None = None
    """Column that names the splits. The default is the one named split, if there is one."""

    val_fraction: float = 0.1
    """Share of the photographs to validate with, from 0 to 1. Duplicates count as one photograph."""

    test_fraction: float = 0.1
    """Share of the photographs to test with, from 0 to 1. Duplicates count as one photograph. 1 makes a dataset to
    evaluate with, which has nothing to train or to validate with."""

    seed: int = 0
    """Number that decides which photograph goes to which split. Another number gives another split."""

    split: Literal["auto", "keep", "random"] = "auto"
    """How to split the photographs: keep keeps the split that a column or the folders name: train, val (validation)
    and test; and draws from train the one that is not named. random draws all splits; auto is keep if splits are named,
    else random."""

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
        _ = self.other_names
        if self.test_fraction == 1 and self.val_fraction in (0, type(self).val_fraction):
            checks.require(self.split != "keep", "--split must be auto or random with --test-fraction=1", self.split)
            object.__setattr__(self, "val_fraction", 0.0)
            return
        if self.val_fraction + self.test_fraction >= 1:
            raise UsageError(
                "--val-fraction and --test-fraction must leave a share for training. "
                f"Received: --val-fraction={self.val_fraction} --test-fraction={self.test_fraction}"
            )

    @property
    def other_names(self) -> dict[str, int]:
        """What `class_names` says: name → index of the class in `CLASS_NAMES`.

        >>> PrepareConfig(images="x", output="y", class_names=("cat=kitten,n02123045", "dog=puppy")).other_names
        {'kitten': 0, 'n02123045': 0, 'puppy': 1}
        """
        found: dict[str, int] = {}
        for each in self.class_names:
            of_class, equals, listed = each.partition("=")
            names = [name.strip() for name in listed.split(",")]
            checks.require(
                of_class in CLASS_NAMES and all(names),
                "--class-names must be cat=NAME,... or dog=NAME,...",
                each if equals else repr(each),
            )
            for name in names:
                index = CLASS_NAMES.index(of_class)
                checks.require(
                    found.setdefault(name, index) == index, "--class-names must give a name to one class", name
                )
        return found

    @property
    def sources(self) -> tuple[str, ...]:
        """The places of the photographs."""
        return (self.images,) if isinstance(self.images, str) else self.images
