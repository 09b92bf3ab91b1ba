"""What a file is, by its name and by its first bytes: an image, an archive, something else, or hidden."""

import re
from typing import Final

from catdog.storage.urls import split_member

HEAD_BYTES: Final = 64
"""Number of first bytes that `looks_like_image` needs."""

_SUFFIX: Final = re.compile(r"[^/.][^/]*\.([a-z][a-z0-9]{0,9})$", re.IGNORECASE)
"""A name and its suffix. What follows the dot of `scan.2024` is no suffix."""

_IMAGES: Final = """
apng avif avifs bmp dib gif heic heics heif heifs hif j2c j2k jfif jif jp2 jpc jpe jpeg jpf jpg jpm jpx jxl mpo pam pbm
pfm pgm png pnm ppm tif tiff webp
cur dds eps exr fits ico icns pcx psb psd qoi ras sgi svg tga xbm xpm
3fr arw cr2 cr3 crw dcr dng erf iiq kdc mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f
"""
"""Suffixes of images, the last two lines those of drawings and the like, and of raw files of cameras."""

_OTHERS: Final = "cls csv db docx html ini json log md parquet pdf tsv txt xml xmp yaml yml"
"""Suffixes of text and tables."""

_IMAGE_SUFFIXES: Final = frozenset(_IMAGES.split())
_OTHER_SUFFIXES: Final = frozenset(_OTHERS.split())

_ARCHIVE: Final = re.compile(
    r"[^/]\.(?:(?P<zip>zip)|(?P<tar>tar|tgz|tbz2|txz|tzst|tar\.(?:gz|bz2|xz|zst)))$", re.IGNORECASE
)

_ARCHIVE_ENDS: Final = ("zip", "tar", "tgz", "gz", "zst", "bz2", "xz")  # also of tzst, tbz2 and txz

_IMAGE_BYTES: Final = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|II[*+]\0|MM\0[*+]|RIFF....WEBP|P[1-6]\s|8BPS"
    rb"|BM.{4}\0\0\0\0|....ftyp(?:avi[fs]|hei[cxms]|hev[cxms]|mif1|msf1|crx )"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51|\xff\x0a|\0\0\0\x0cJXL ",
    re.DOTALL,
)
"""The first bytes of JPEG, PNG, GIF, TIFF and raw files, WebP, PPM, Photoshop files, BMP, AVIF and HEIC, JPEG 2000 and
JPEG XL."""


def name_of(uri: str) -> str:
    """The last name in a URL or path: `cat.1.jpg` of `zip://train/cat.1.jpg::s3://bucket/train.zip`."""
    chained = split_member(uri)
    return (uri if chained is None else chained[0]).rpartition("/")[2]


def suffix_of(uri: str) -> str:
    """The suffix of a file's name in lower case and without its dot; "" if the name has none.

    >>> suffix_of("/photos/CAT.JPG"), suffix_of("zip://scan.2024::/x.zip")
    ('jpg', '')
    """
    found = _SUFFIX.search(name_of(uri))
    return "" if found is None else found[1].lower()


def is_image_suffix(suffix: str) -> bool:
    """Whether a suffix is that of an image, also of one in a format that catdog does not read."""
    return suffix in _IMAGE_SUFFIXES


def is_other_name(uri: str) -> bool:
    """Whether the file's name says that it is no image, but a read-me, say, or a licence beside the photographs."""
    return suffix_of(uri) in _OTHER_SUFFIXES


def looks_like_image(head: bytes) -> bool:
    """Whether the first bytes of a file are those of an image, also of one in a format that catdog does not read."""
    return _IMAGE_BYTES.match(head) is not None


def archive_scheme(uri: str) -> str | None:
    """`zip` or `tar`, if the file's name says that it is such an archive: the scheme of its members' URLs."""
    name = uri.partition("::")[0] if split_member(uri) else uri
    if not name.lower().endswith(_ARCHIVE_ENDS):  # most files are images, and a regular expression takes longer
        return None
    found = _ARCHIVE.search(name)
    return None if found is None else found.lastgroup


def without_archive_suffix(name: str) -> str:
    """The name of an archive without its suffix: `train` of `train.tar.gz`. Any other name as it is."""
    found = _ARCHIVE.search(name)
    return name if found is None else name[: found.start() + 1]


_SYSTEM: Final = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN"})
"""What macOS adds to an archive, the folders in which a Synology keeps small copies of photographs, and bins."""


_MAYBE_HIDDEN: Final = re.compile(rf"(?:^|/)(?:\.|{'|'.join(map(re.escape, sorted(_SYSTEM)))})")


def is_hidden(path: str) -> bool:
    """Whether a name in a path starts with a dot, or is a folder of a system's own. `.` and `..` hide nothing."""
    if _MAYBE_HIDDEN.search(path) is None:
        return False
    return any((part.startswith(".") and part not in (".", "..")) or part in _SYSTEM for part in path.split("/"))
