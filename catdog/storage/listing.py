"""Finding images. Listings stream: see `catdog.storage.walking`."""

import collections
import errno
import functools
import itertools
import logging
import os
import posixpath
import stat
from collections.abc import Collection, Iterable, Iterator

from catdog.errors import StorageError, UsageError
from catdog.provenance import redact
from catdog.storage import archives, embedded, inventory, manifests, outages, patterns, s3, walking
from catdog.storage.filesystems import (
    OBJECT_STORES,
    SourceFile,
    attempt,
    describe,
    filesystem,
    info,
    require,
    version_of,
    version_of_status,
)
from catdog.storage.names import archive_scheme, is_hidden
from catdog.storage.patterns import Chosen
from catdog.storage.sifting import NOT_AN_IMAGE, Found, Sieve
from catdog.storage.urls import absolute, is_local, join, local_path, location, outermost, split_member, storage_of

logger = logging.getLogger(__name__)


class Listing(Iterator[SourceFile]):
    """The files of a collection, one after the other. `list_images` makes one.

    Attributes:
        skipped: how many things were passed over so far, by reason: `not_an_image` (neither by its name nor by its
            first bytes), `unreadable_directory`, `loop` (a symbolic link that leads to itself or to a directory above
            it), `not_a_file` (a pipe, a socket, a device; in a tar archive a link), `old_version` (in an S3 Inventory).
            Hidden names are not counted. It is complete when the listing has ended.
        first_skipped: the first of them, by reason.
    """

    def __init__(self) -> None:
        self.skipped: collections.Counter[str] = collections.Counter()
        self._sieve: Sieve | None = None
        self.first_skipped: dict[str, str] = {}
        self._has_told = False
        self._files: Iterator[SourceFile] = iter(())

    def __next__(self) -> SourceFile:
        try:
            return next(self._files)
        except StopIteration:
            for reason, place in () if self._has_told else self.first_skipped.items():
                level = logging.INFO if reason == NOT_AN_IMAGE else logging.WARNING
                logger.log(
                    level, "%d skipped, for the reason %s, the first %s", self.skipped[reason], reason, redact(place)
                )
            self._has_told = True
            raise

    def skip(self, reason: str, place: str) -> None:
        """Count something that is not listed."""
        self.skipped[reason] += 1
        self.first_skipped.setdefault(reason, place)

    @property
    def num_left_out(self) -> int:
        """How many files, and archives, were left out so far because `chosen` does not take them."""
        return 0 if self._sieve is None else self._sieve.num_left_out

    def begin(self, files: Iterator[SourceFile], sieve: Sieve | None = None) -> None:
        """Say where the files come from, and what leaves some of them out."""
        self._files, self._sieve = files, sieve


def list_images(
    url: str,
    *,
    exclude: str | None = None,
    own: Collection[str] | None = None,
    columns: manifests.Columns | None = None,
    chosen: Chosen | None = None,
    skip_others: bool = False,
    allow_empty: bool = False,
) -> Listing:
    """Every file of a collection, in a deterministic order.

    `url` is one of:
    - a directory or prefix, listed recursively;
    - a glob of files (`catdog.storage.patterns`);
    - one file;
    - a `.zip` or `.tar` archive, compressed (`.tar.gz`, `.tgz`, `.tar.zst`, `.tar.bz2`, `.tar.xz`) or not, or one
      member or one folder of it;
    - a manifest (`catdog.storage.manifests`): a table whose rows name the files, or hold images. A relative name
      starts at the directory of the table;
    - the `manifest.json` of an S3 Inventory (`catdog.storage.inventory`), which lists a bucket.

    Archives are read in place, also those that a directory, a glob or another archive holds. If such an archive cannot
    be read, it is listed itself; what is read of it is an error that says why.

    In S3, an object and a prefix may have the same name. `s3://bucket/pets/`, with a slash at its end, is the prefix
    alone; `s3://bucket/pets` is both: the object, and all that lies under the prefix.

    A manifest may spell a relative name or a local path in several ways (`x`, `./x`, `d/../x`): the file has the uri
    that a listing of its directory gives it. The URL of an object is taken as it is: `d//x` and `d/x` may be two.

    Names that start with a dot are skipped, and so are folders like `__MACOSX` (`names.is_hidden`). (`.` and `..` hide
    nothing: `./photos/cat.jpg`, as some programs name the members of an archive, is listed.) Local directories that may
    not be read, and symbolic links that lead back, are skipped and counted in `Listing.skipped`. If an archive holds
    two members of one name, both are listed, each with its own version. Every row of a manifest gives a file, also if
    an earlier row named the same file, and also if there is no such file (its version is then "").

    Args:
        url: the collection.
        exclude: the job's output. It is an error if something under it belongs to the collection, also if a glob or
            a symbolic link leads there.
        own: what `storage_of` says of the job's own storages; those of `url` and `exclude` belong to them. If another
            storage fails when a manifest's file is looked up there, the file is listed with the version "".
        columns: which columns of a manifest hold what.
        chosen: which files are listed; None for all.
        skip_others: skip what is no image, neither by its name nor by its first bytes. Only files whose suffix is not
            that of an image are looked into. A file that `url` or a manifest names is never skipped. Without this, a
            file that is no image becomes an error when it is read.
        allow_empty: whether there may be nothing to list.

    Raises:
        UsageError: there is nothing at `url`, or no file in it, or a file is not what its name says, or it includes
            the output.
        StorageError: the storage failed.
    """
    url = absolute(url, keep_slash=True)
    listing = Listing()
    own = {storage_of(place) for place in (url, exclude or url)} | set(own or ())
    sieve = Sieve(listing.skip, chosen or Chosen(), skips_others=skip_others)
    found = _list(url, listing, sieve, lambda uri: _look_up(uri, listing, own), columns or manifests.Columns())
    if exclude is not None:
        found = _without(found, url, absolute(exclude))
    files = sieve.sifted(found)
    try:
        first = next(files, None)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not allow_empty or url.partition("://")[0] not in OBJECT_STORES:
            raise UsageError(f"--images must exist. Received: --images={redact(url)}") from error
        first = None
    listing.begin(files if first is None else itertools.chain([first], files), sieve)
    if first is None and not allow_empty and not sieve.num_left_out and not listing.skipped[NOT_AN_IMAGE]:
        raise UsageError(f"--images must hold at least one file. Received: --images={redact(url)}")
    return listing


def _without(found: Iterator[Found], images: str, output: str) -> Iterator[Found]:
    """The files, all of which must lie outside the output."""
    error = UsageError(
        f"--output must not lie inside --images. Received: --images={redact(images)} --output={redact(output)}"
    )
    if split_member(images) is None and patterns.is_glob(images) and _would_list(images, output):
        raise error
    outer = location(output)

    @functools.lru_cache(maxsize=1024)
    def is_inside(place: str) -> bool:
        return location(place).startswith(outer)

    for each in found:
        place = outermost(each.file.uri)
        directory = place.rpartition("/")[0] or "/"
        if is_inside(directory) or (is_local(place) and os.path.islink(local_path(place)) and is_inside(place)):
            raise error
        yield each


def _would_list(images: str, output: str) -> bool:
    """Whether a glob matches what predict or prepare may write directly under an output, if it is no directory."""
    directory = patterns.fixed(images).rpartition("/")[0] or "/"
    if "://" in images and "://" not in directory:
        return False  # a later check refuses it
    inner, outer = location(output), location(directory)
    if not inner.startswith(outer):
        return False
    is_match = patterns.matcher(images)
    base = directory.rstrip("/") + "/" + inner.removeprefix(outer)
    return any(is_match(base + name) for name in ("part-0.parquet", "dataset.json", "train/part-0.parquet"))


def find_tables(url: str) -> list[str] | None:
    """The tables of a manifest; None if there is something else at a URL, or nothing."""
    url = absolute(url)
    listing = Listing()
    sieve = Sieve(listing.skip, Chosen(), skips_others=False)
    try:
        if _kind(url) == "file":
            return [url] if manifests.is_table(url) and inventory.find(url) is None else None
        files = _walk(url, listing, sieve)
    except (FileNotFoundError, NotADirectoryError):
        if split_member(url) is not None or not patterns.is_glob(url):
            return None
        files = _walk_glob(url, listing, sieve)
    tables, _ = manifests.tables_among(url, files)
    return tables or None


def list_names(url: str, suffix: str = "") -> list[str]:
    """Sorted names directly under a directory that end in `suffix`; none if there is no such directory.

    Names that start with a dot are left out: those files are temporary, or not ours.
    """
    return [name for name in list_all_names(url) if name.endswith(suffix) and not name.startswith(".")]


def list_all_names(url: str, prefix: str = "") -> list[str]:
    """Sorted names directly under a directory that start with `prefix`; none if there is no such directory.

    Of a large directory in S3, only these names are asked for.
    """
    url = absolute(url)
    try:
        if is_local(url):
            names: Iterable[str] = require(url, lambda: os.listdir(local_path(url)))
        else:
            names = _list_remote(url, prefix)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if name.startswith(prefix))


def list_files(url: str) -> dict[str, SourceFile]:
    """What lies directly under a directory, by name; nothing if there is no such directory.

    The version of a file tells whether it was replaced: its ETag; of a local file its size, its time of change and its
    number on the disk. That of a directory is "". Names that start with a dot are left out, as for `list_names`.
    """
    url = absolute(url)

    def local_files() -> dict[str, SourceFile]:
        with os.scandir(local_path(url)) as entries:
            return {entry.name: _local_file(entry) for entry in entries if not entry.name.startswith(".")}

    try:
        if is_local(url):
            return require(url, local_files)
        return {name: file for name, file in _list_remote(url).items() if not name.startswith(".")}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _list_remote(url: str, prefix: str = "") -> dict[str, SourceFile]:
    fs, path = filesystem(url, fresh=True)
    if s3.is_s3(fs):
        return walking.list_s3(fs, url, prefix)
    found = {}
    for entry in require(url, lambda: fs.ls(path, detail=True)):
        name = entry["name"].rstrip("/").rpartition("/")[2]
        if entry["name"].rstrip("/") != path.rstrip("/"):
            version = "" if entry["type"] == "directory" else version_of(entry)
            found[name] = SourceFile(join(url, name), version, entry.get("size") or 0)
    return found


def _local_file(entry: os.DirEntry[str]) -> SourceFile:
    try:
        status = entry.stat()
    except FileNotFoundError:  # it has just gone, or is a broken link
        return SourceFile(entry.path, "", 0)
    version = "" if entry.is_dir() else f"{version_of_status(status)}-{status.st_ino}"
    return SourceFile(entry.path, version, status.st_size)


def exists(url: str) -> bool:
    """Whether there is a file or a directory at a URL."""
    try:
        _kind(absolute(url))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _kind(url: str) -> str:
    """`file` or `directory`; FileNotFoundError if there is neither."""

    def look() -> str:
        if is_local(url):
            return "directory" if stat.S_ISDIR(os.stat(local_path(url)).st_mode) else "file"
        return str(info(url, fresh=True)["type"])

    return require(url, look)


def _list(
    url: str, listing: Listing, sieve: Sieve, look_up: manifests.LookUp, columns: manifests.Columns
) -> Iterator[Found]:
    def listed(place: str, files: Iterator[SourceFile]) -> Iterator[Found]:
        tables, files = manifests.tables_among(place, files)
        if tables:
            files = manifests.list_manifest(tables, columns, look_up)
        for file in files:
            yield from [Found(file, is_named=True)] if tables else _opened(Found(file), listing, sieve)

    if embedded.split_row(url) is not None:
        yield Found(look_up(url) or SourceFile(url, "", 0), is_named=True)
        return
    if (chained := split_member(url)) is not None:
        yield from _list_named_archive(chained[1], listing, sieve, under=chained[0])
        return
    is_prefix, url = url.endswith("/") and url != "/" and not url.endswith("://"), absolute(url)
    has_keys = s3.is_s3_url(url) and "/" in url.partition("://")[2]
    if is_prefix and has_keys:
        files = listed(url, _walk(url, listing, sieve))
        if (first := next(files, None)) is not None:
            yield first
            yield from files
            return
    try:
        if is_prefix and has_keys:
            raise FileNotFoundError(errno.ENOENT, "there is no such prefix")
        kind = _kind(url)
    except (FileNotFoundError, NotADirectoryError):
        if not patterns.is_glob(url):
            raise
        yield from listed(url, _walk_glob(url, listing, sieve))
        return
    if kind == "directory":
        yield from listed(url, _walk(url, listing, sieve))
        return
    sieve.base = url.rpartition("/")[0] + "/"
    if archive_scheme(url):
        yield from _list_named_archive(url, listing, sieve)
    elif (objects := inventory.find(url)) is not None:
        sieve.base = f"s3://{objects.bucket}/"
        for listed_object in inventory.list_objects(objects, look_up, listing.skip):
            yield from _opened(Found(listed_object), listing, sieve)
    elif manifests.is_table(url):
        yield from (Found(file, is_named=True) for file in manifests.list_manifest([url], columns, look_up))
    elif (file := look_up(url)) is not None:
        yield Found(file, is_named=True)
    if has_keys:
        yield from listed(url, _walk(url, listing, sieve))


def _walk(url: str, listing: Listing, sieve: Sieve) -> Iterator[SourceFile]:
    sieve.base = url.rstrip("/") + "/"
    return walking.walk(url, listing.skip)


def _walk_glob(url: str, listing: Listing, sieve: Sieve) -> Iterator[SourceFile]:
    fixed = patterns.fixed(url)
    directory = fixed.rpartition("/")[0] or "/"
    if "://" in url and "://" not in directory:
        raise UsageError(f"A glob must name its bucket. Received: {redact(url)}")
    sieve.base = directory.rstrip("/") + "/"
    is_match = patterns.matcher(url)
    files = walking.walk(directory, listing.skip, walking.Depth.of(url, directory), fixed)
    return (file for file in files if is_match(file.uri))


def _opened(found: Found, listing: Listing, sieve: Sieve) -> Iterator[Found]:
    """A file of many, or if it is an archive, its members. An archive that cannot be read stands for itself."""
    uri = found.file.uri
    if archive_scheme(uri) is None:
        yield found
    elif not sieve.drops(uri):
        try:
            if split_member(uri) is None:
                archives.forget(uri)
            yield from _list_archive(uri, listing, sieve)
        except (UsageError, FileNotFoundError, PermissionError) as error:
            logger.warning("%s is listed as one image that cannot be read: %s", redact(uri), describe(error))
            yield Found(found.file, is_named=True)


def _list_named_archive(archive: str, listing: Listing, sieve: Sieve, under: str = "") -> Iterator[Found]:
    if under and archive_scheme(under):  # an archive in an archive
        inner = archives.stat_member(archive, under).uri
        archive, under = inner, ""
    sieve.base, sieve.folder = archive, under and posixpath.normpath(under) + "/"
    archives.forget(archive)
    try:
        yield from _list_archive(archive, listing, sieve, under)
    except PermissionError as error:
        raise StorageError(f"{redact(archive)}: permission denied: {describe(error)}") from error


def _list_archive(archive: str, listing: Listing, sieve: Sieve, under: str = "") -> Iterator[Found]:
    folder, is_slow = posixpath.normpath(under), archives.is_slow(archive)
    for file, is_file, head in archives.list_members(archive):
        member, _ = split_member(file.uri) or ("", "")
        name = posixpath.normpath(member)
        if is_hidden(member) or (under and name != folder and not name.startswith(folder + "/")):
            continue
        if is_file:
            is_named = bool(under) and name == folder
            yield from _opened(Found(file, is_named, head, is_slow), listing, sieve)
        else:
            listing.skip("not_a_file", file.uri)


def _look_up(uri: str, listing: Listing, own: Collection[str]) -> SourceFile | None:
    """The file of this name; None for a pipe, a socket or a device. If nothing can be read there, its version is ""."""
    if is_local(uri):
        return walking.stat_local(local_path(uri), listing.skip)

    def look() -> SourceFile:
        found = info(uri)
        return SourceFile(uri, version_of(found), found["size"] or 0)

    is_own = storage_of(uri) in (*own, "")
    if not is_own and outages.known(uri).is_given_up:
        return SourceFile(uri, "", 0)
    patience_s = None if is_own else outages.FOREIGN_PATIENCE_S
    try:
        if (row := embedded.split_row(uri)) is not None:
            return SourceFile(uri, attempt(uri, lambda: embedded.version_of_table(row[2]), patience_s=patience_s), 0)
        if (chained := split_member(uri)) is not None:
            return archives.stat_member(chained[1], chained[0], patience_s=patience_s)
        return attempt(uri, look, patience_s=patience_s)
    except (OSError, UsageError):
        return SourceFile(uri, "", 0)
    except StorageError:
        if is_own:
            raise
        return SourceFile(uri, "", 0)
