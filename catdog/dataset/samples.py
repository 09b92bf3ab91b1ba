"""`samples.png`: some pictures of the training split, as a person would want to see them before training."""

import io
from itertools import islice
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont, ImageOps

from catdog import images
from catdog.dataset.reading import DatasetInfo, iter_split
from catdog.schema import CLASS_NAMES

_NUM_COLUMNS: Final = 8
_ROWS_PER_CLASS: Final = 2
_TILE_PX: Final = 160
_GAP_PX: Final = 8
_CAPTION_PX: Final = 18
_HEADER_PX: Final = 40
_MARGIN_PX: Final = 20
_SEARCHED_ROWS: Final = 1024

_INK: Final = "#1f2933"
_QUIET: Final = "#7b8794"


def sample_grid(info: DatasetInfo) -> bytes:
    """A PNG of training images, a block per class, each with its size."""
    pictures = _pick(info)
    block_px = _HEADER_PX + _ROWS_PER_CLASS * (_TILE_PX + _CAPTION_PX + _GAP_PX)
    width = 2 * _MARGIN_PX + _NUM_COLUMNS * (_TILE_PX + _GAP_PX) - _GAP_PX
    canvas = Image.new("RGB", (width, 2 * _MARGIN_PX + len(CLASS_NAMES) * block_px), "white")
    draw = ImageDraw.Draw(canvas)
    title, caption = ImageFont.load_default(size=22), ImageFont.load_default(size=12)
    for index, name in enumerate(CLASS_NAMES):
        top = _MARGIN_PX + index * block_px
        draw.text((_MARGIN_PX, top), name, fill=_INK, font=title)
        count = f"{info.counts['train'][name]:,} for training"
        draw.text((_MARGIN_PX + draw.textlength(f"{name}  ", font=title), top + 9), count, fill=_QUIET, font=caption)
        for position, row in enumerate(pictures[index]):
            line, column = divmod(position, _NUM_COLUMNS)
            x = _MARGIN_PX + column * (_TILE_PX + _GAP_PX)
            y = top + _HEADER_PX + line * (_TILE_PX + _CAPTION_PX + _GAP_PX)
            tile = ImageOps.fit(images.open_upright(row["image"]), (_TILE_PX, _TILE_PX))
            canvas.paste(tile, (x, y))
            draw.text((x, y + _TILE_PX + 2), f"{row['width']} x {row['height']} px", fill=_QUIET, font=caption)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def _pick(info: DatasetInfo) -> list[list[dict[str, Any]]]:
    """The first training images of each class, among the first rows."""
    wanted = _NUM_COLUMNS * _ROWS_PER_CLASS
    picked: list[list[dict[str, Any]]] = [[] for _ in CLASS_NAMES]
    batch_size = 64
    for batch in islice(iter_split(info, "train", batch_size=batch_size), _SEARCHED_ROWS // batch_size):
        for row in batch.to_pylist():
            if len(picked[row["label"]]) < wanted:
                picked[row["label"]].append(row)
        if all(len(rows) == wanted for rows in picked):
            break
    return picked
