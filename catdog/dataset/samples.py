"""Drawing `samples.png`: pictures of the training split that a person should look at before training."""

from itertools import islice
from typing import Final

from catdog.dataset.reading import DatasetInfo, iter_split
from catdog.schema import CLASS_NAMES

NUM_PER_CLASS: Final = 12
"""Number of images of each class on the sheet, which are two rows."""

_PURPOSES: Final = {"train": "training", "test": "testing", "val": "validation"}

_BATCH_SIZE: Final = 64
_MAX_BATCHES: Final = 16  # after that many, the sheet shows fewer images of a class that is rare


def sample_sheet(info: DatasetInfo) -> bytes:
    """Draw the first training images of each class, with their sizes, as a PNG; or those of the split that there is."""
    from catdog import report  # imported here because it loads matplotlib, which nothing else in `dataset` needs

    split, purpose = next(each for each in _PURPOSES.items() if info.num_images(each[0]))
    tiles: dict[str, list[report.Tile]] = {name: [] for name in CLASS_NAMES}
    columns = ["label", "image", "width", "height"]
    for batch in islice(iter_split(info, split, columns, _BATCH_SIZE), _MAX_BATCHES):
        for row in batch.to_pylist():
            of_class = tiles[CLASS_NAMES[row["label"]]]
            if len(of_class) < NUM_PER_CLASS:
                of_class.append(report.Tile(image=row["image"], caption=f"{row['width']} × {row['height']} px"))
        if all(len(of_class) == NUM_PER_CLASS for of_class in tiles.values()):
            break
    return report.sheet(
        [
            report.Section(heading=f"{name}: {info.counts[split][name]:,} for {purpose}", tiles=of_class)
            for name, of_class in tiles.items()
        ]
    )
