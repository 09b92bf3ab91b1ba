"""An output is read by the programs that people read Parquet with, as README says how, while it is added to."""

from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from inference_case import photographs, rows_of, save_model
from ray_case import small_ray

from catdog.config import CompactConfig, PredictConfig
from catdog.inference import predict
from catdog.inference.compaction import compact

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs and errors of four runs. The parts of three were merged, and are there without rows; of those that
    have rows, one has nothing but labels, and two have nothing but errors.
    """
    root = tmp_path_factory.mktemp("readers")
    images, output = photographs(root / "photos", 20), root / "out"
    config = PredictConfig(images=str(images), output=str(output), model=save_model(str(root / "model")))
    predict(config)
    for name in ("late", "later", "last"):
        if name == "last":
            assert compact(CompactConfig(output=str(output))).num_merged == 3
        (images / f"{name}.jpg").write_bytes(b"\xff\xd8\xff nothing more")
        predict(config)
    assert sorted(pq.read_metadata(path).num_rows for path in output.glob("*.parquet")) == [0, 0, 0, 1, 6, 20]
    assert len(list((output / "_runs").glob("*.json"))) == 4
    return output


def test_pandas_pyarrow_duckdb_and_polars(output: Path) -> None:
    expected = rows_of(output).sort_by("uri")
    frames = {
        "pandas": pa.Table.from_pandas(pd.read_parquet(output), preserve_index=False),
        "pyarrow": pyarrow.dataset.dataset(output).to_table(),
        "duckdb": duckdb.read_parquet(f"{output}/*.parquet").to_arrow_table(),
        "polars": pl.read_parquet(output / "*.parquet").to_arrow(),
        "polars, lazily": pl.scan_parquet(output / "*.parquet").collect().to_arrow(),
    }
    for name, found in frames.items():
        assert found.column_names == expected.column_names, name
        found = found.sort_by("uri")
        for column in ("uri", "image_id", "label", "prob_dog", "needs_review", "error_code", "num_bytes", "remark"):
            assert found[column].to_pylist() == expected[column].to_pylist(), (name, column)


def test_ray_data(output: Path) -> None:
    with small_ray(num_cpus=2):
        import ray.data

        found = ray.data.read_parquet(str(output)).take_all()
    expected = rows_of(output).to_pylist()
    assert sorted(row["uri"] for row in found) == sorted(row["uri"] for row in expected)
