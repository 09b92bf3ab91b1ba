"""JPEG: huge ones are decoded at a fraction of their size, and those cut short are shown if little is missing."""

import io
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_images import SIZE, encode, error_of, photo, pixels

from catdog import images
from catdog.errors import ImageError
from catdog.images import jpeg
from catdog.schema import ERROR_CODES

WHOLE = "the file is cut short, but shows the whole picture"


def grainy(width: int = 400, height: int = 300) -> Image.Image:
    grain = np.random.default_rng(0).normal(0, 10, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(photo(width, height)) + grain, 0, 255).astype(np.uint8))


def outcome_of(data: bytes) -> str:
    """The error's code, else the remark; the same for each way of decoding."""

    def outcome(decode: Callable[[], images.DecodedImage | images.CanonicalImage]) -> str:
        try:
            return getattr(decode(), "remark", None) or "ok"
        except ImageError as error:
            return error.code

    found = {outcome(partial(images.decode, data, size_px)) for size_px in (8, SIZE, 400)}
    (one,) = found
    assert outcome(partial(images.canonical_bytes, data)) == (one if one in ERROR_CODES else "ok")
    return one


# Cut short.

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full chroma": {"subsampling": 0},
    "restarts": {"restart_marker_blocks": 7},
    "progressive": {"progressive": True},
    "progressive, full chroma": {"progressive": True, "subsampling": 0},
    "grey": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_that_lacks_its_end_marker_is_shown_whole(kind: str) -> None:
    data = encode(grainy().convert("L") if kind == "grey" else grainy(), "JPEG", quality=90, **KINDS[kind])
    assert outcome_of(data) == "ok"
    for cut in (data[:-2], data[:-1]):
        assert outcome_of(cut) == WHOLE
        np.testing.assert_array_equal(pixels(cut), pixels(data))
        assert images.open_upright(cut) == images.open_upright(data)
        canonical = images.canonical_bytes(cut)
        if kind == "grey":
            assert canonical == images.canonical_bytes(data)
        else:
            assert canonical == images.CanonicalImage(data, 400, 300)


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_that_lacks_its_last_rows_says_how_many(kind: str) -> None:
    """Wherever it is cut: what it calls whole is whole, to the last bit; what it calls missing mostly is."""
    data = encode(grainy().convert("L") if kind == "grey" else grainy(), "JPEG", quality=90, **KINDS[kind])
    whole = np.asarray(images.open_upright(data)).astype(int)
    outcomes = []
    for share in (0.001, 0.01, 0.02, 0.03, 0.05, 0.07, 0.09, 0.12, 0.15, 0.2, 0.4, 0.6, 0.9):
        cut = data[: int(len(data) * (1 - share))]
        outcomes.append(outcome := outcome_of(cut))
        if outcome == "truncated":
            continue
        missing = int(outcome.removeprefix("the file is cut short: of its 300 rows, the last ").split()[0])
        assert 0 < missing <= jpeg.MAX_MISSING * 300
        differs = np.abs(np.asarray(images.open_upright(cut)) - whole).max(axis=(1, 2)) > 0
        first = int(differs.argmax())  # interpolation of the colours reaches one row further than the data
        assert missing - 18 < 300 - first <= missing + 1
        canonical = images.canonical_bytes(cut).data
        assert images.decode(canonical, SIZE).remark is None  # it has an end now
        assert np.abs(pixels(canonical) - pixels(cut)).max() <= (3 if kind == "grey" else 0)
    num_shown = len(outcomes) - outcomes.count("truncated")
    assert 0 < num_shown < len(outcomes)
    assert outcomes[num_shown:] == ["truncated"] * (len(outcomes) - num_shown)


@pytest.mark.parametrize("options", [{"restart_marker_blocks": 7}, {"restart_marker_rows": 1}])
def test_a_jpeg_that_is_cut_at_a_restart_marker_says_how_many_rows(options: dict[str, int]) -> None:
    data = encode(grainy(), "JPEG", quality=90, **options)
    whole = np.asarray(images.open_upright(data)).astype(int)
    restarts = [found.start() for found in re.finditer(rb"\xff[\xd0-\xd7]", data)]
    num_shown = 0
    for start in restarts[len(restarts) * 3 // 4 :: 2]:
        for end in range(start - 1, start + 4):
            outcome = outcome_of(data[:end])
            if outcome != "truncated":
                num_shown += 1
                missing = int(outcome.split("the last ")[1].split()[0])
                differs = np.abs(np.asarray(images.open_upright(data[:end])) - whole).max(axis=(1, 2)) > 0
                assert missing - 18 < 300 - differs.argmax() <= missing + 1
    assert 0 < num_shown < len(restarts) * 5 / 8


def test_zeros_in_place_of_what_never_came_are_no_picture() -> None:
    data = encode(grainy(), "JPEG", quality=90)
    assert jpeg.mended(data[: len(data) // 2] + bytes(len(data) // 2)) is None
    nearly = data[: int(0.97 * len(data))]
    assert jpeg.mended(nearly + bytes(4096)) == jpeg.mended(nearly)
    assert jpeg.mended(data[:-2] + bytes(1)) == jpeg.Mended(data, WHOLE)


def test_a_progressive_jpeg_without_its_last_scans_is_truncated() -> None:
    data = encode(grainy(), "JPEG", quality=90, progressive=True)
    scans = [index for index in range(len(data)) if data[index : index + 2] == b"\xff\xda"]
    assert len(scans) > 3
    for start in scans[1:]:
        assert error_of(data[:start]).code == "truncated"


def test_an_upright_jpeg_that_is_cut_short_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(grainy(), "JPEG", quality=90, exif=exif)
    decoded = images.decode(data[:-2], SIZE)
    assert (decoded.width, decoded.height, decoded.remark) == (300, 400, WHOLE)
    np.testing.assert_array_equal(decoded.pixels_HWC, images.decode(data, SIZE).pixels_HWC)


def test_small_pictures_lack_their_end_marker_at_most() -> None:
    data = encode(grainy(60, 60), "JPEG", quality=90)
    assert outcome_of(data[:-2]) == WHOLE
    assert error_of(data[:-40]).code == "truncated"


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xda", b"\xff\xd8\xff\xc2\0\x0b\x08"]
)
def test_what_has_no_picture_is_not_mended(data: bytes) -> None:
    assert jpeg.mended(data) is None
    assert error_of(data).code in ("empty_file", "truncated", "decode_failed", "unsupported_format")


# Huge.


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> int:
    """A limit of 20,000 pixels in place of the real one."""
    monkeypatch.setattr(images, "MAX_PIXELS", 20_000)
    monkeypatch.setattr(images, "_MAX_COEFFICIENTS", 3 * 20_000)
    return 20_000


@pytest.mark.parametrize(("width", "height", "scale"), [(150, 120, 1), (400, 100, 2), (400, 300, 4), (1000, 900, 8)])
def test_a_huge_jpeg_is_decoded_at_a_fraction_of_its_size(limited: int, width: int, height: int, scale: int) -> None:
    data = encode(photo(width, height), "JPEG", quality=95)
    for size_px in (8, 64, 1000):
        decoded = images.decode(data, size_px)
        assert (decoded.width, decoded.height) == (width, height)
        plain = photo(width, height).resize((size_px, size_px), Image.Resampling.BILINEAR)
        assert np.abs(decoded.pixels_HWC.astype(int) - np.asarray(plain)).mean() < 3
    upright = images.open_upright(data)
    assert upright.size == (-(-width // scale), -(-height // scale))
    assert upright.width * upright.height <= limited
    assert images.canonical_bytes(data) == images.CanonicalImage(data, width, height)


def test_a_huge_jpeg_that_must_be_turned_is_stored_smaller(limited: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo(400, 300), "JPEG", exif=exif, quality=95)
    canonical = images.canonical_bytes(data)
    assert (canonical.width, canonical.height) == (300, 400)
    with Image.open(io.BytesIO(canonical.data)) as image:
        assert image.size == (75, 100)
    assert np.abs(pixels(canonical.data, 32) - pixels(data, 32)).mean() < 2


def test_a_jpeg_that_is_too_large_even_at_an_eighth_is_refused(limited: int) -> None:
    error = error_of(encode(Image.new("L", (1400, 1400)), "JPEG"))
    assert (error.code, str(error)) == ("too_large", "1400 x 1400 px is more than 20000 pixels")
    assert error_of(encode(photo(300, 200), "PNG")).code == "too_large"


@pytest.mark.parametrize(
    ("mode", "subsampling", "size", "num_held"),
    [
        ("RGB", 0, (160, 160), 3 * 160 * 160),
        ("RGB", 1, (200, 160), 2 * 200 * 160),
        ("RGB", 2, (208, 208), 3 * 208 * 208 // 2),
        ("L", 0, (320, 200), 320 * 200),
    ],
)
def test_a_huge_progressive_jpeg_is_refused_by_what_a_decoder_holds(
    limited: int, mode: str, subsampling: int, size: tuple[int, int], num_held: int
) -> None:
    image = photo(*size).convert(mode)
    error = error_of(encode(image, "JPEG", progressive=True, subsampling=subsampling))
    assert (error.code, str(error)) == (
        "too_large",
        "a JPEG in several scans, as every progressive one is, must have at most 60000 coefficients. "
        f"Received: {num_held}, of {size[0]} x {size[1]} px",
    )
    assert images.decode(encode(image, "JPEG", subsampling=subsampling), SIZE).width == size[0]
    smaller = image.resize((140, 140))
    assert images.decode(encode(smaller, "JPEG", progressive=True, subsampling=subsampling), SIZE).width == 140


def test_a_huge_jpeg_of_several_sequential_scans_is_refused_like_a_progressive_one(limited: int) -> None:
    data = bytearray(encode(photo(200, 200), "JPEG", subsampling=0))
    start = data.index(b"\xff\xda")
    data[start : start + 14] = (
        b"\xff\xda\0\x08\x01" + data[start + 5 : start + 7] + b"\0\x3f\0" + data[start + 14 :][:0]
    )
    assert "several scans" in str(error_of(bytes(data)))


MEASURED = """
import pathlib, resource, sys
from catdog import images
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decoded = images.decode(pathlib.Path(sys.argv[1]).read_bytes(), 260)
print(decoded.width, decoded.height, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(12_000, 9_000), (16_320, 12_240)], ids=["108 MP", "200 MP"])
def test_the_photographs_of_the_largest_cameras_take_little_memory(width: int, height: int, tmp_path: Path) -> None:
    tile = grainy(width // 20, height // 20).convert("L")
    image = Image.new("L", (width, height))
    for x in range(0, width, tile.width):
        for y in range(0, height, tile.height):
            image.paste(tile, (x, y))
    image.save(tmp_path / "huge.jpg", quality=90)
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "huge.jpg")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    size = (tmp_path / "huge.jpg").stat().st_size / 2**20
    found_width, found_height, peak_mib = map(int, ran.stdout.split())
    assert (found_width, found_height) == (width, height)
    assert peak_mib < size + 40  # the file, and its draft
