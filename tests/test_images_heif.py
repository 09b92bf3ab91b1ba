"""HEIF: HEIC files of several encoders, turned once; what is damaged or too large; what happens without the library."""

import concurrent.futures
import contextlib
import io
import subprocess
import sys
from typing import Any

import numpy as np
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_images import SIZE, as_stored, encode, error_of, photo, pixels

from catdog import images
from catdog.errors import ImageError
from catdog.images import heif


def heic(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, **{"quality": 90, **options})
    return buffer.getvalue()


def expected(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)).astype(int)


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
@pytest.mark.parametrize("options", [{}, {"chroma": 444}, {"tile_size": 128}], ids=["plain", "full chroma", "tiles"])
def test_heic_files_are_decoded(mode: str, options: dict[str, Any]) -> None:
    image = photo()
    stored = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else image
    stored = stored.convert("L") if mode == "L" else stored
    data = heic(stored, **options)
    decoded = images.decode(data, SIZE)
    assert (decoded.width, decoded.height, decoded.remark) == (300, 200, None)
    shown = expected(image if mode == "RGB" else image.convert("L"))
    assert np.abs(decoded.pixels_HWC - shown).mean() < 3


def test_transparency_of_heic_is_white() -> None:
    image = Image.new("RGBA", (128, 128), (200, 30, 40, 255))
    image.paste((0, 0, 0, 0), (64, 0, 128, 128))
    shown = pixels(heic(image))
    assert np.abs(shown[:, : SIZE // 2 - 4] - (200, 30, 40)).max() <= 6
    assert shown[:, SIZE // 2 + 4 :].min() >= 249


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_heic_file_is_turned_once(orientation: int) -> None:
    """The encoder turns EXIF's orientation into HEIF's own; where it also stays in the EXIF data, it does not count."""
    upright = photo()
    stored, exif = as_stored(upright, orientation)
    written = heic(stored, exif=exif.tobytes())
    in_exif = b"\x12\x01\x03\0\x01\0\0\0" if b"II*\0" in written else b"\x01\x12\0\x03\0\0\0\x01"
    value = written.index(in_exif) + len(in_exif)
    both = bytearray(written)
    both[value : value + 2] = orientation.to_bytes(2, "little" if b"II*\0" in written else "big")
    for data in (written, bytes(both)):
        decoded = images.decode(data, SIZE)
        assert (decoded.width, decoded.height) == upright.size
        assert np.abs(decoded.pixels_HWC - expected(upright)).mean() < 3
        assert images.open_upright(data).size == upright.size
        canonical = images.canonical_bytes(data)
        assert (canonical.width, canonical.height) == upright.size
        assert np.abs(pixels(canonical.data) - decoded.pixels_HWC).mean() < 1.5


def test_heic_is_stored_as_jpeg() -> None:
    canonical = images.canonical_bytes(heic(photo()))
    with Image.open(io.BytesIO(canonical.data)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (300, 200))
        assert "exif" not in image.info
    assert images.canonical_bytes(canonical.data) == canonical


def test_the_primary_picture_counts() -> None:
    file = pillow_heif.from_pillow(Image.new("RGB", (80, 80), "red"))
    file.add_from_pillow(photo())
    for index, shown in [(0, Image.new("RGB", (80, 80), "red")), (1, photo())]:
        buffer = io.BytesIO()
        file.save(buffer, primary_index=index, quality=90)
        assert np.abs(pixels(buffer.getvalue()) - expected(shown)).mean() < 3


def test_an_embedded_thumbnail_does_not_stand_for_the_picture() -> None:
    file = pillow_heif.from_pillow(photo(1200, 800))
    plain, with_thumbnail = io.BytesIO(), io.BytesIO()
    file.save(plain, quality=90)
    pillow_heif.from_pillow(photo(1200, 800)).save(with_thumbnail, quality=90, thumbnails=[256])
    assert len(with_thumbnail.getvalue()) > len(plain.getvalue())
    np.testing.assert_array_equal(pixels(with_thumbnail.getvalue()), pixels(plain.getvalue()))


@pytest.mark.parametrize(
    ("brands", "is_heif"),
    [
        (b"heic\0\0\0\0mif1heic", True),
        (b"heix\0\0\0\0", True),
        (b"mif1\0\0\0\0mif1heic", True),
        (b"mif1\0\0\0\0miaf", True),
        (b"msf1\0\0\0\0hevc", True),
        (b"avif\0\0\0\0mif1miaf", False),
        (b"mif1\0\0\0\0avifmiaf", False),
        (b"avis\0\0\0\0msf1avif", False),
        (b"isom\0\0\0\0mp41", False),
        (b"qt  \0\0\0\0qt  ", False),
        (b"crx \0\0\0\1crx isom", False),
    ],
)
def test_heif_is_known_by_its_brands(brands: bytes, is_heif: bool) -> None:
    data = (8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands + bytes(100)
    assert heif.is_heif(data) is is_heif
    assert not heif.is_heif(data[4:])
    assert error_of(data).code in {"decode_failed", "truncated", "unsupported_format"}


@pytest.mark.parametrize("major", [b"mif1", b"heix"])
def test_heic_under_another_brand(major: bytes) -> None:
    data = heic(photo())
    assert data[8:12] == b"heic"
    np.testing.assert_array_equal(pixels(data[:8] + major + data[12:]), pixels(data))


def test_a_huge_heic_is_refused_by_its_header() -> None:
    data = bytearray(heic(photo()))
    start = data.index(b"ispe") + 8
    data[start : start + 8] = (20_000).to_bytes(4, "big") * 2
    error = error_of(bytes(data))
    assert (error.code, str(error)) == ("too_large", f"20000 x 20000 px is more than {images.MAX_PIXELS} pixels")
    data[start : start + 8] = (10).to_bytes(4, "big") * 2
    assert error_of(bytes(data)).code == "decode_failed"  # the picture is not as large as the header says


def test_cut_heic_files_are_truncated() -> None:
    whole = heic(photo())
    assert {error_of(whole[:cut]).code for cut in range(40, len(whole), 61)} == {"truncated"}


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_heic_files_only_ever_raise_image_errors(data: st.DataObject) -> None:
    damaged = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        assert images.decode(bytes(damaged), 32).pixels_HWC.shape == (32, 32, 3)


SAMPLE = heic(photo(90, 70))


def test_threads_see_what_one_sees() -> None:
    files = [heic(photo(100 + 37 * i, 300 - 11 * i)) for i in range(8)] * 4
    one_by_one = [pixels(data) for data in files]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        np.testing.assert_array_equal(list(pool.map(pixels, files)), one_by_one)


@pytest.mark.parametrize("duration", [40, 1000])
def test_the_first_picture_of_an_avif_sequence_counts(duration: int) -> None:
    frames = [photo(80, 60), Image.new("RGB", (80, 60), "lime")]
    data = encode(frames[0], "AVIF", save_all=True, append_images=frames[1:], duration=duration, quality=95)
    assert data[8:12] == b"avis"
    assert np.abs(pixels(data) - expected(frames[0])).mean() < 3


# Without the library.

DECODE = """
import pathlib, sys
from catdog import images
from catdog.errors import ImageError
if sys.argv[2] == "without":
    sys.modules["pillow_heif"] = None  # as if it were not installed
try:
    print(images.decode(pathlib.Path(sys.argv[1]).read_bytes(), 8).width)
except ImageError as error:
    print(f"{error.code}: {error}")
print("pillow_heif" in sys.modules)
"""


@pytest.mark.parametrize(
    ("data", "how", "printed"),
    [
        (encode(photo(), "JPEG"), "with", ["300", "False"]),
        (encode(photo(), "AVIF"), "with", ["300", "False"]),
        (b"no image", "with", None),
        (SAMPLE, "with", ["90", "True"]),
        (
            SAMPLE,
            "without",
            [
                "unsupported_format: HEIC and HEIF need one more package: pip install 'catdog[heif]'. "
                "Received: import of pillow_heif halted; None in sys.modules",
                "True",
            ],
        ),
    ],
    ids=["JPEG", "AVIF", "none", "HEIC", "HEIC without the library"],
)
def test_only_heif_files_need_the_library(tmp_path: Any, data: bytes, how: str, printed: list[str] | None) -> None:
    (tmp_path / "file").write_bytes(data)
    command = [sys.executable, "-c", DECODE, str(tmp_path / "file"), how]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = ran.stdout.splitlines()
    assert lines == printed if printed else lines[-1] == "False"
