"""Labels that lie beside the images in a tar archive, as WebDataset has them: `17.jpg` and `17.cls`."""

from itertools import islice
from typing import Final

import duckdb
import pyarrow as pa

from catdog.dataset.labels import Classes
from catdog.storage.archives import webdataset
from catdog.storage.urls import split_member

_BATCH_ROWS: Final = 16_384


def set_labels(connection: duckdb.DuckDBPyConnection, classes: Classes) -> None:
    """Give the unlabelled images of tar archives in the table `listing` the labels of their samples.

    Labels that `classes` does not know are no labels.
    """
    unlabelled = connection.execute("SELECT uri FROM listing WHERE label IS NULL AND starts_with(uri, 'tar://')")
    archives: dict[str, None] = {}
    while rows := unlabelled.fetchmany(_BATCH_ROWS):
        archives.update(dict.fromkeys(chained[1] for (uri,) in rows if (chained := split_member(uri)) is not None))
    for archive in archives:
        labelled = iter(webdataset.labels(archive))
        while batch := list(islice(labelled, _BATCH_ROWS)):
            found = [(file.uri, file.version, classes.of_label(label)) for file, label in batch]
            uris, versions, indices = zip(*found, strict=True)
            rows_of_samples = pa.table({"uri": uris, "version": versions, "label": pa.array(indices, pa.int8())})
            connection.register("_samples", rows_of_samples)
            connection.execute(
                "UPDATE listing SET label = _samples.label FROM _samples "
                "WHERE listing.label IS NULL AND listing.uri = _samples.uri AND listing.version = _samples.version"
            )
            connection.unregister("_samples")
