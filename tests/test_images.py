"""Decoding: real odd files, synthetic pictures in every format and pixel mode, and damage of every kind."""

import concurrent.futures
import csv
import functools
import io
import re
import struct
import subprocess
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from catdog import images
from catdog.errors import ImageError
from catdog.schema import ERROR_CODES

SIZE = 64

REFUSED = {
    "pillow/10ct_32bit_128.tiff": "unsupported_format",  # mode F, with values from -3.1 to 3.1
    "pillow/broken_data_stream.png": "decode_failed",  # Pillow itself only "loads" it when asked twice
}
"""Files in common formats that Pillow is said to load and we do not."""

MENDED = {"pillow/truncated_jpeg.jpg"}  # lacks the last byte of its end marker
"""Files that Pillow is said not to load and we do."""


def encode(image: Image.Image, format: str, **options: Any) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(width: int = 300, height: int = 200) -> Image.Image:
    """Smooth, in colour, and different at each corner."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / (width - 1), 255 * y / (height - 1)
    blue = 127 + 120 * np.sin(x / width * 6) * np.cos(y / height * 5)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def as_stored(upright: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    """The picture as a camera stores it that was held otherwise, and the EXIF data that says so."""
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored, exif


def pixels(data: bytes, size_px: int = SIZE) -> np.ndarray[Any, Any]:
    return images.decode(data, size_px).pixels_HWC.astype(int)


def error_of(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        images.decode(data, SIZE)
    assert caught.value.code in ERROR_CODES
    return caught.value


def png(width: int, height: int, body: bytes = b"", bits: int = 1) -> bytes:
    """A PNG with any header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


# Every odd file that we could find


def test_every_odd_file_is_decoded_or_named(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with (shared_data / "odd.csv").open() as file:
        known = {row["file"]: row for row in csv.DictReader(file)}
    loaded_sizes = []
    load = ImageFile.ImageFile.load

    def noting_load(self: ImageFile.ImageFile) -> Any:
        loaded_sizes.append(self.size)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noting_load)
    outcomes: dict[str, str] = {}
    with zipfile.ZipFile(shared_data / "odd.zip") as archive, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for name in archive.namelist():
            try:
                decoded = images.decode(archive.read(name), SIZE)
            except ImageError as error:
                outcomes[name] = error.code
                continue
            assert decoded.pixels_HWC.shape == (SIZE, SIZE, 3)
            assert decoded.pixels_HWC.dtype == np.uint8
            assert decoded.width * decoded.height > 0
            outcomes[name] = "ok"
            assert (decoded.remark is not None) == (name in MENDED), name
    assert len(outcomes) == 591
    assert set(outcomes.values()) <= {"ok", *ERROR_CODES}
    assert max(width * height for width, height in loaded_sizes) <= images.MAX_PIXELS
    assert warned == []
    assert capfd.readouterr() == ("", "")
    for name, row in known.items():
        common = row["format"] in (*images.FORMATS, "MPO")
        if name in MENDED:
            assert outcomes[name] == "ok"
        elif name in REFUSED:
            assert outcomes[name] == REFUSED[name]
        elif row["pillow_load"] == "ok":
            assert outcomes[name] == ("ok" if common else "unsupported_format"), name
        else:
            assert outcomes[name] != "ok", name
        if row["width"] and float(row["width"]) * float(row["height"]) > images.MAX_PIXELS:
            assert outcomes[name] == ("too_large" if common else "unsupported_format")
        if (
            "truncated" in row["pillow_load"].lower()
            and common
            and outcomes[name] != "too_large"
            and name not in MENDED
        ):
            assert outcomes[name] == "truncated"
    assert list(outcomes.values()).count("ok") == 416


@pytest.mark.parametrize(
    "pattern",
    [
        "exif-samples/orientation__landscape_{}.jpg",
        "exif-samples/orientation__portrait_{}.jpg",
        "recurser/Landscape_{}.jpg",
        "recurser/Portrait_{}.jpg",
        "libvips/rotation__{}.jpg",
    ],
)
def test_orientations_of_real_photographs(shared_data: Path, pattern: str) -> None:
    with zipfile.ZipFile(shared_data / "odd.zip") as archive:
        present = {i: pattern.format(i) for i in range(9) if pattern.format(i) in archive.namelist()}
        decoded = {i: images.decode(archive.read(name), SIZE) for i, name in present.items()}
    assert len(decoded) > 3
    first = decoded[min(decoded)]
    for image in decoded.values():
        assert (image.width > image.height) == (first.width > first.height)
        # They differ in the digit in their middle, and some in brightness; turned otherwise they differ far more.
        turned = [np.rot90(pixels, k) for pixels in (image.pixels_HWC, image.pixels_HWC[:, ::-1]) for k in range(4)]
        upright, *others = (np.abs(pixels.astype(int) - first.pixels_HWC).mean() for pixels in turned)
        assert upright < min(others) / 2


# What decode does


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_orientations(format_: str, orientation: int) -> None:
    upright = photo()
    stored, exif = as_stored(upright, orientation)
    data = encode(stored, format_, exif=exif, **({} if format_ == "TIFF" else {"quality": 95}))
    decoded = images.decode(data, SIZE)
    assert (decoded.width, decoded.height) == upright.size
    expected = np.asarray(upright.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(decoded.pixels_HWC - expected).mean() < 1.5
    assert images.open_upright(data).size == upright.size
    canonical = images.canonical_bytes(data)
    assert (canonical.width, canonical.height) == upright.size
    with Image.open(io.BytesIO(canonical.data)) as image:
        assert (image.mode, image.size) == ("RGB", upright.size)
        assert image.getexif().get(0x0112, 1) == 1


def test_damaged_exif_is_no_reason_to_refuse() -> None:
    data = encode(photo(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    assert images.decode(data, SIZE).width == 300


def test_pixels_are_those_of_a_plain_resize() -> None:
    data = encode(photo(250, 90), "PNG")
    expected = np.asarray(photo(250, 90).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(images.decode(data, SIZE).pixels_HWC, expected)


def test_big_jpegs_are_drafted_and_look_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 12, (1500, 2000, 3))
    image = Image.fromarray(np.clip(np.asarray(photo(2000, 1500)) + grain, 0, 255).astype(np.uint8))
    data = encode(image, "JPEG", quality=92)
    expected = np.asarray(images.open_upright(data).resize((SIZE, SIZE), Image.Resampling.BILINEAR)).astype(int)
    resized = []
    resize = Image.Image.resize

    def noting_resize(self: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        resized.append(self.size)
        return resize(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", noting_resize)
    decoded = images.decode(data, SIZE)
    assert resized == [(250, 188)]  # an eighth, and still more than twice the target
    assert (decoded.width, decoded.height) == (2000, 1500)
    difference = np.abs(decoded.pixels_HWC - expected)
    assert difference.mean() < 1
    assert difference.max() < 8
    images.decode(data, 150)
    assert resized[1] == (500, 375)


@pytest.mark.parametrize(
    ("mode", "format_", "tolerance"),
    [
        ("RGB", "PNG", 0),
        ("RGB", "BMP", 0),
        ("RGB", "PPM", 0),
        ("RGB", "TIFF", 0),
        ("RGB", "JPEG2000", 0),
        ("RGB", "WEBP", 0),
        ("RGB", "AVIF", 3),
        ("RGB", "JPEG", 3),
        ("YCbCr", "JPEG", 3),
        ("CMYK", "JPEG", 3),
        ("CMYK", "TIFF", 1),
        ("LAB", "TIFF", 4),
        ("P", "PNG", 14),
        ("P", "GIF", 14),
        ("RGBA", "PNG", 0),
        ("RGBA", "WEBP", 0),
        ("RGBA", "TIFF", 0),
    ],
)
def test_colour_modes(mode: str, format_: str, tolerance: float) -> None:
    of_formats: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 98, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 95},
    }
    options = of_formats.get(format_, {})
    image = photo()
    if mode == "LAB":
        transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        stored = ImageCms.applyTransform(image, transform)
        assert stored is not None
    else:
        stored = image.convert(mode)
    decoded = pixels(encode(stored, format_, **options))
    expected = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(decoded - expected).mean() <= tolerance


def test_grey_modes() -> None:
    ramp = np.tile(np.linspace(0, 255, 256), (64, 1))
    expected = np.asarray(Image.fromarray(ramp.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    deep = Image.fromarray((ramp * 257).astype(np.uint16))
    assert deep.mode == "I;16"
    grey = Image.fromarray(ramp.astype(np.uint8))
    for image, formats in [(grey, ["PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP"]), (deep, ["PNG", "TIFF", "JPEG2000"])]:
        for format_ in formats:
            decoded = pixels(encode(image, format_))
            assert np.abs(decoded - expected[..., None]).max() <= 2, (image.mode, format_)
    big_endian = io.BytesIO()
    Image.frombytes("I;16B", deep.size, np.asarray(deep).astype(">u2").tobytes()).save(big_endian, "TIFF")
    assert np.abs(pixels(big_endian.getvalue()) - expected[..., None]).max() <= 1
    black_and_white = pixels(encode(grey.point(lambda value: 255 * (value > 127)).convert("1"), "PNG"))
    assert black_and_white[:, : SIZE // 2 - 1].max() == 0
    assert black_and_white[:, SIZE // 2 + 1 :].min() == 255


def test_transparency_is_white() -> None:
    half = Image.new("L", (100, 100), 0)
    half.paste(255, (0, 0, 50, 100))
    red = Image.new("RGB", (100, 100), (200, 30, 40))
    rgba = red.copy()
    rgba.putalpha(half)
    grey = Image.new("L", (100, 100), 90)
    grey_alpha = Image.merge("LA", (grey, half))
    palette = Image.new("P", (100, 100), 0)
    palette.putpalette([200, 30, 40, 1, 2, 3])
    palette.paste(1, (50, 0, 100, 100))
    keyed = red.copy()
    keyed.paste((1, 2, 3), (50, 0, 100, 100))
    for data, colour in [
        (encode(rgba, "PNG"), (200, 30, 40)),
        (encode(rgba, "WEBP", lossless=True), (200, 30, 40)),
        (encode(rgba, "TIFF"), (200, 30, 40)),
        (encode(grey_alpha, "PNG"), (90, 90, 90)),
        (encode(palette, "PNG", transparency=1), (200, 30, 40)),
        (encode(palette, "PNG", transparency=b"\xff\x00"), (200, 30, 40)),
        (encode(palette, "GIF", transparency=1), (200, 30, 40)),
        (encode(keyed, "PNG", transparency=(1, 2, 3)), (200, 30, 40)),
    ]:
        decoded = pixels(data)
        assert (decoded[:, : SIZE // 2 - 2] == colour).all()
        assert (decoded[:, SIZE // 2 + 2 :] == 255).all()
    rgba.putalpha(128)
    assert np.abs(pixels(encode(rgba, "PNG")) - (227, 142, 147)).max() <= 1


@pytest.mark.parametrize("format_", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_frame_counts(format_: str) -> None:
    frames = [Image.new("RGB", (80, 60), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], format_, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(data) - (255, 0, 0)).max() <= 3
    canonical = images.canonical_bytes(data)
    with Image.open(io.BytesIO(canonical.data)) as image:
        assert not getattr(image, "is_animated", False)
        assert image.convert("RGB").getpixel((5, 5)) == pytest.approx((255, 0, 0), abs=3)


def test_threads_see_what_one_sees() -> None:
    files = [encode(photo(100 + 37 * i, 400 - 11 * i), ["JPEG", "PNG", "WEBP", "GIF"][i % 4]) for i in range(24)] * 6
    expected = [images.decode(data, SIZE).pixels_HWC for data in files]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda data: images.decode(data, SIZE).pixels_HWC, files))
    np.testing.assert_array_equal(found, expected)


# Canonical bytes


def test_plain_files_come_back_unchanged() -> None:
    image = photo()
    upright = Image.Exif()
    upright[0x0112] = 1
    for data in [
        encode(image, "JPEG"),
        encode(image, "JPEG", exif=upright, progressive=True),
        encode(image, "PNG"),
        encode(image, "WEBP"),
        encode(image, "MPO", save_all=True, append_images=[photo(50, 50)]),
    ]:
        assert images.canonical_bytes(data) == images.CanonicalImage(data, 300, 200)


def test_others_are_encoded_anew() -> None:
    image = photo()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for data, format_ in [
        (encode(image.convert("L"), "JPEG"), "JPEG"),
        (encode(image.convert("CMYK"), "JPEG", icc_profile=profile), "JPEG"),
        (encode(image.convert("RGBA"), "PNG", icc_profile=profile), "PNG"),
        (encode(image.convert("P"), "PNG"), "PNG"),
        (encode(image, "BMP"), "PNG"),
        (encode(image, "TIFF", icc_profile=profile), "PNG"),
        (encode(image, "GIF"), "PNG"),
        (encode(image, "AVIF"), "PNG"),
    ]:
        canonical = images.canonical_bytes(data)
        with Image.open(io.BytesIO(canonical.data)) as stored:
            assert (stored.format, stored.mode, stored.size) == (format_, "RGB", image.size)
            assert "icc_profile" not in stored.info
        difference = np.abs(pixels(canonical.data) - pixels(data))
        assert difference.mean() < (1.5 if format_ == "JPEG" else 0.01)
        assert images.canonical_bytes(canonical.data).data == canonical.data


def test_canonical_bytes_are_validated() -> None:
    with pytest.raises(ImageError, match="truncated"):
        images.canonical_bytes(encode(photo(), "JPEG")[:-2000])


# What is refused


def test_what_is_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("started a process"))
    assert error_of(b"").code == "empty_file"
    for data in [
        b"x",
        b"hello world" * 100,
        b"%PDF-1.7 ...",
        bytes(1000),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ]:
        assert error_of(data).code == "unsupported_format"
    eps = encode(photo(), "EPS")
    assert error_of(eps).code == "unsupported_format"
    assert error_of(encode(photo(), "TGA")).code == "unsupported_format"


@pytest.mark.parametrize("format_", ["TIFF", "PPM"])
@pytest.mark.parametrize(
    ("mode", "white"), [("F", 1), ("F", 255), ("F", 65535), ("I", 255), ("I", 65535)], ids=lambda value: str(value)
)
def test_deep_pixels_are_scaled_to_the_smallest_white_that_none_exceeds(format_: str, mode: str, white: int) -> None:
    if (format_, mode, white) == ("PPM", "I", 255):
        return  # Pillow writes, and reads, 65535 as the white of such a PGM file: see below
    ramp = np.tile(np.linspace(0, 1, 256), (64, 1))
    expected = pixels(encode(Image.fromarray(np.rint(ramp * 255).astype(np.uint8)), "PNG"))
    values = (ramp * white).astype(np.float32) if mode == "F" else np.rint(ramp * white).astype(np.int32)
    image = Image.fromarray(values)
    assert image.mode == mode
    assert np.abs(pixels(encode(image, format_)) - expected).max() <= 1


def test_the_white_of_a_deep_pgm_file_is_its_own() -> None:
    header = b"P5 2 1 1000\n"
    dark = images.open_upright(header + struct.pack(">2H", 0, 100))
    assert [dark.getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), (26, 26, 26)]
    bright = images.open_upright(header + struct.pack(">2H", 500, 1000))
    assert [bright.getpixel((x, 0)) for x in range(2)] == [(128, 128, 128), (255, 255, 255)]


def test_the_white_of_16_bits_with_a_sign_is_the_largest_of_them() -> None:
    data = bytearray(encode(Image.fromarray(np.array([[0, 100, 16384, 32767]], np.uint16)), "TIFF"))
    assert data[-8:] == struct.pack("<4H", 0, 100, 16384, 32767)
    at = data.index(struct.pack("<HHI", 284, 3, 1))  # in place of the planar configuration, which counts for nothing
    data[at : at + 12] = struct.pack("<HHII", 339, 3, 1, 2)  # integers with a sign
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "I"
    upright = images.open_upright(bytes(data))
    assert [upright.getpixel((x, 0)) for x in range(4)] == [(value,) * 3 for value in (0, 1, 128, 255)]
    data[-2:] = struct.pack("<h", -1)
    assert str(error_of(bytes(data))).endswith("must have values from 0 to 32767. Received: -1 to 16384")


@pytest.mark.parametrize(
    ("values", "received"),
    [
        (np.array([[-1, 5]], np.int32), "-1 to 5"),
        (np.array([[0, 65536]], np.int32), "0 to 65536"),
        (np.array([[-0.5, 1]], np.float32), "-0.5 to 1"),
        (np.array([[0, 1e9]], np.float32), "0 to 1e+09"),
        (np.array([[0, np.inf]], np.float32), "0 to inf"),
        (np.array([[np.nan, 1]], np.float32), "nan to nan"),
    ],
)
def test_deep_pixels_without_a_white_are_refused(values: np.ndarray[Any, Any], received: str) -> None:
    error = error_of(encode(Image.fromarray(values), "TIFF"))
    assert error.code == "unsupported_format"
    assert re.fullmatch(
        rf"TIFF with the pixel mode [IF] must have values from 0 to .*65535\. Received: {re.escape(received)}",
        str(error),
    )


def test_bombs_are_refused_by_their_header() -> None:
    side = 9459  # 9459^2 < MAX_PIXELS < 9460^2
    rows = zlib.compress(bytes((side // 8 + 2) * side))
    allowed = images.decode(png(side, side, rows), SIZE)
    assert allowed.width == side
    for width, height in [(side + 1, side + 1), (2**31 - 1, 2**31 - 1), (images.MAX_PIXELS + 1, 1), (13_400, 13_400)]:
        error = error_of(png(width, height, b"never looked at"))
        assert error.code == "too_large"
        assert str(images.MAX_PIXELS) in str(error)
    assert error_of(b"P5 20000 20000 255\n").code == "too_large"


def test_memory_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError):
        images.decode(encode(photo(), "PNG"), SIZE)


@functools.cache
def samples() -> dict[str, bytes]:
    image = photo(90, 70)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "JPEG": encode(image, "JPEG", exif=exif),
        "progressive": encode(image, "JPEG", progressive=True),
        "PNG": encode(image, "PNG"),
        "palette": encode(image.convert("P"), "PNG", transparency=3),
        "GIF": encode(image, "GIF"),
        "WEBP": encode(image, "WEBP"),
        "TIFF": encode(image, "TIFF", compression="tiff_lzw"),
        "BMP": encode(image, "BMP"),
        "AVIF": encode(image, "AVIF"),
        "JPEG2000": encode(image, "JPEG2000"),
        "PPM": encode(image, "PPM"),
    }


def decodes_or_is_named(data: bytes) -> str:
    try:
        assert images.decode(data, 32).pixels_HWC.shape == (32, 32, 3)
        assert images.canonical_bytes(data).width > 0
    except ImageError as error:
        return error.code
    return "ok"


@given(st.sampled_from(sorted(samples())), st.data())
@settings(max_examples=300, deadline=None)
def test_truncation_only_ever_raises_image_errors(name: str, data: st.DataObject) -> None:
    whole = samples()[name]
    cut = data.draw(st.integers(0, len(whole) - 1))
    decodes_or_is_named(whole[:cut])


@given(st.sampled_from(sorted(samples())), st.data())
@settings(max_examples=300, deadline=None)
def test_damage_only_ever_raises_image_errors(name: str, data: st.DataObject) -> None:
    damaged = bytearray(samples()[name])
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    decodes_or_is_named(bytes(damaged))


def test_cut_jpegs_are_truncated() -> None:
    whole = encode(photo(400, 300), "JPEG")
    codes = [decodes_or_is_named(whole[:cut]) for cut in range(700, len(whole), 97)]
    num_truncated = codes.count("truncated")
    assert codes == ["truncated"] * num_truncated + ["ok"] * (len(codes) - num_truncated)
    assert 0.85 < num_truncated / len(codes) < 1


PICTURE, THUMBNAIL, OTHER = (200, 30, 40), (20, 120, 220), (30, 200, 60)


def page(colour: tuple[int, int, int], width: int, height: int, kind: int | None = None) -> tuple[bytes, int | None]:
    """Raw RGB pixels, and what the page's NewSubfileType says."""
    return struct.pack("<II", width, height) + bytes(colour) * (width * height), kind


def tiff_file(
    *pages: tuple[bytes, int | None], below: tuple[bytes, int | None] | None = None, raw: bool = False
) -> bytes:
    """A TIFF file with these pages and one that belongs to the first. `raw` makes the last a mosaic of a sensor."""
    data = bytearray(b"II*\0\0\0\0\0")
    link = 4

    def add(content: bytes, kind: int | None, *, is_mosaic: bool, below_at: int | None = None) -> tuple[int, int]:
        """Append a page. Returns its place, and where the place of the next one is to stand."""
        width, height = struct.unpack("<II", content[:8])
        bits_at = len(data)
        data.extend(struct.pack("<3H", 8, 8, 8) + b"\0\0")
        strip_at = len(data)
        data.extend(content[8:] + b"\0" * (-len(content) % 4))
        entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, bits_at), (259, 3, 1, 1)]
        entries += [(262, 3, 1, 32803 if is_mosaic else 2), (273, 4, 1, strip_at), (277, 3, 1, 3)]
        entries += [(278, 4, 1, height), (279, 4, 1, width * height * 3)]
        entries += [] if kind is None else [(254, 4, 1, kind)]
        entries += [] if below_at is None else [(330, 4, 1, below_at)]
        at = len(data)
        packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
        data.extend(struct.pack("<H", len(entries)) + packed + bytes(4) + bytes(-(2 + len(packed) + 4) % 4))
        return at, at + 2 + len(packed)

    below_at = None if below is None else add(*below, is_mosaic=raw)[0]
    for number, (content, kind) in enumerate(pages):
        is_mosaic = raw and below is None and number == len(pages) - 1
        at, next_link = add(content, kind, is_mosaic=is_mosaic, below_at=below_at if number == 0 else None)
        data[link : link + 4] = struct.pack("<I", at)
        link = next_link
    return bytes(data)


@pytest.mark.parametrize(
    ("pages", "colour", "size"),
    [
        ([page(THUMBNAIL, 16, 12, 1), page(PICTURE, 60, 40, 0)], PICTURE, (60, 40)),  # the file says which is which
        ([page(THUMBNAIL, 15, 10), page(PICTURE, 60, 40)], PICTURE, (60, 40)),  # their sizes say it
        ([page(THUMBNAIL, 15, 10), page(OTHER, 30, 20), page(PICTURE, 60, 40)], PICTURE, (60, 40)),
        ([page(PICTURE, 60, 40), page(THUMBNAIL, 15, 10)], PICTURE, (60, 40)),
        ([page(PICTURE, 60, 40, 0), page(THUMBNAIL, 16, 12, 1)], PICTURE, (60, 40)),
        ([page(PICTURE, 60, 40), page(OTHER, 60, 40)], PICTURE, (60, 40)),  # two pages of a document
        ([page(PICTURE, 20, 20), page(OTHER, 20, 20), page(THUMBNAIL, 60, 60)], PICTURE, (20, 20)),
        ([page(PICTURE, 40, 20), page(OTHER, 80, 80)], PICTURE, (40, 20)),
        ([page(THUMBNAIL, 16, 12, 1), page(PICTURE, 60, 40, 2), page(OTHER, 60, 40, 2)], PICTURE, (60, 40)),
        ([page(OTHER, 60, 40, 4), page(PICTURE, 60, 40, 0)], PICTURE, (60, 40)),  # a mask
        ([page(PICTURE, 60, 40, 1)], PICTURE, (60, 40)),  # there is nothing else
    ],
)
def test_of_the_pages_of_a_tiff_file_the_first_that_is_no_thumbnail_counts(
    pages: list[tuple[bytes, int | None]], colour: tuple[int, int, int], size: tuple[int, int]
) -> None:
    data = tiff_file(*pages)
    decoded = images.decode(data, 8)
    assert (decoded.width, decoded.height) == size
    np.testing.assert_array_equal(decoded.pixels_HWC, np.broadcast_to(np.array(colour, np.uint8), (8, 8, 3)))
    canonical = images.canonical_bytes(data)
    assert (canonical.width, canonical.height) == size
    assert images.open_upright(data).getpixel((0, 0)) == colour


def test_floating_point_pixels_that_pillow_does_not_read_are_named() -> None:
    deep = bytearray(encode(Image.new("F", (10, 10), 0.5), "TIFF"))
    bits = deep.index(struct.pack("<HHI", 258, 3, 1)) + 8
    deep[bits : bits + 2] = struct.pack("<H", 64)
    colour = tiff_file(page(PICTURE, 60, 40, 0))
    floats = colour.replace(struct.pack("<HHII", 254, 4, 1, 0), struct.pack("<HHII", 339, 3, 1, 3))
    for data in (bytes(deep), floats):
        error = error_of(data)
        assert error.code == "unsupported_format"
        assert str(error) == "TIFF with floating-point pixels is read if it is grey and of 32 bits"
    assert tuple(pixels(colour)[0, 0]) == PICTURE


@pytest.mark.parametrize(
    "data",
    [
        tiff_file(page(THUMBNAIL, 16, 12, 1), below=page(PICTURE, 60, 40, 0), raw=True),  # as DNG, NEF and ARW
        tiff_file(page(THUMBNAIL, 16, 12, 1), below=page(PICTURE, 60, 40, 0)),
        tiff_file(page(THUMBNAIL, 15, 10), below=page(PICTURE, 60, 40)),
        tiff_file(page(THUMBNAIL, 16, 12, 1), page(PICTURE, 60, 40, 0), raw=True),
    ],
)
def test_a_picture_of_which_only_a_thumbnail_can_be_read_is_refused(data: bytes) -> None:
    error = error_of(data)
    assert error.code == "unsupported_format"
    assert str(error).startswith("only a thumbnail can be read of this picture of 60 x 40 px")


def test_a_tiff_file_whose_pages_go_in_a_circle_is_read() -> None:
    data = bytearray(tiff_file(page(PICTURE, 60, 40), page(OTHER, 60, 40)))
    first = struct.unpack("<I", data[4:8])[0]
    data[-6:-2] = struct.pack("<I", first)  # the last page's link, before two bytes of padding
    assert tuple(pixels(bytes(data))[0, 0]) == PICTURE
