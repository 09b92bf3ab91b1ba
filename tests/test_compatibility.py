"""What catdog 0.1.0 wrote is read, resumed and added to: its Parquet files did not say the version of their schema."""

import json
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from inference_case import photographs, rows_of, save_model

from catdog import dataset, schema
from catdog.config import PredictConfig
from catdog.errors import DatasetError, OutputRefusedError
from catdog.inference import predict, verify
from catdog.inference.books import Books

pytestmark = pytest.mark.slow

LATER_COLUMNS = {1: ("remark", "review_reason"), 2: ("review_reason",)}
"""Version of the predictions → the columns that it did not have yet."""


def of_version(path: Path, version: int) -> None:
    """Write a Parquet file again in an earlier version. catdog 0.1.0 wrote version 1, without saying so."""
    table = pq.read_table(path)
    name, _, _ = table.schema.metadata[b"catdog.schema"].rpartition(b"/")
    table = table.drop_columns([each for each in table.column_names if each in LATER_COLUMNS[version]])
    metadata = {b"catdog.schema": b"%s/%d" % (name, version)} if version > 1 else None
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")


def of_a_later_version(path: Path) -> None:
    table = pq.read_table(path)
    (name, _) = table.schema.metadata[b"catdog.schema"].split(b"/")
    pq.write_table(table.replace_schema_metadata({b"catdog.schema": name + b"/99"}), path)


@pytest.mark.parametrize("version", LATER_COLUMNS)
def test_an_earlier_output_is_added_to(version: int, tmp_path: Path) -> None:
    images, output = photographs(tmp_path / "photos", 20), tmp_path / "out"
    model = save_model(str(tmp_path / "model"))
    config = PredictConfig(images=str(images), output=str(output), model=model, executor="inline")
    first = predict(config)
    for path in output.glob("part-*.parquet"):
        of_version(path, version)
    record = output / "_runs" / f"{first.run_id}.json"
    written = json.loads(record.read_text())
    record.write_text(json.dumps({name: value for name, value in written.items() if name != "host"}))
    earlier = rows_of(output)

    assert verify(str(output)).rows == 24
    assert predict(config).books == Books(listed=24, ok=0, error=0, already_done=24, duplicate=0)
    (images / "new.jpg").write_bytes((images / "000.jpg").read_bytes())
    (images / "gone.jpg").unlink()
    assert predict(config).books == Books(listed=24, ok=1, error=0, already_done=23, duplicate=0)
    (images / "letter.jpg").touch()
    retry = PredictConfig(images=str(images), output=str(output), model=model, executor="inline", retry_errors=True)
    assert predict(retry).books.error == 3
    summary = verify(str(output))
    assert (summary.rows, summary.runs) == (26, 4)
    kept = rows_of(output)
    ok = [row for row in earlier.to_pylist() if row["status"] == "ok"]
    assert not set(LATER_COLUMNS[version]) & {*earlier.column_names}
    assert all(row in kept.to_pylist() for row in ok)
    # An output keeps its columns: DuckDB and Polars read no files that lie together and differ.
    assert {tuple(pq.read_schema(path).names) for path in output.glob("part-*.parquet")} == {
        tuple(earlier.column_names)
    }
    marks = {(pq.read_schema(path).metadata or {}).get(b"catdog.schema") for path in output.glob("part-*.parquet")}
    assert marks <= {None, b"predictions/%d" % version}
    ((count,),) = duckdb.execute(f"SELECT count(*) FROM '{output}/part-*.parquet'").fetchall()
    assert count == 26


def test_an_output_of_a_later_version_is_refused(tmp_path: Path) -> None:
    images, output = photographs(tmp_path / "photos", 3), tmp_path / "out"
    config = PredictConfig(images=str(images), output=str(output), model=save_model(str(tmp_path / "model")))
    predict(config)
    for path in output.glob("part-*.parquet"):
        of_a_later_version(path)
    message = r"holds none: it is predictions/99, and this catdog reads predictions/1 to predictions/3$"
    with pytest.raises(OutputRefusedError, match=message):
        predict(config)


def test_an_earlier_dataset_is_read_and_a_later_one_refused(tmp_path: Path) -> None:
    from test_evaluation import rows_of as pictures
    from test_evaluation import write_dataset

    data = write_dataset(str(tmp_path / "data"), [pictures([(0, -50), (1, 50)])])
    (shard,) = Path(data).glob("test/*.parquet")
    of_version(shard, 1)
    assert sum(len(batch) for batch in dataset.iter_split(data, "test")) == 2
    pq.write_table(pq.read_table(shard).cast(schema.DATASET_SCHEMA), shard)
    of_a_later_version(shard)
    with pytest.raises(DatasetError, match=r"but it is dataset/99, and this catdog reads dataset/1 to dataset/1$"):
        list(dataset.iter_split(data, "test"))
