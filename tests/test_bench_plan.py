"""`catdog bench plan`, in small."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from catdog.bench import simulated_s3
from catdog.bench.plan import NEW_OF, bench_plan, rows_of
from catdog.config import BenchPlanConfig
from catdog.schema import PREDICTIONS_SCHEMA


@pytest.mark.slow
def test_plans_of_a_small_collection(tmp_path: Path) -> None:
    record = bench_plan(BenchPlanConfig(output=str(tmp_path), num_objects=12_345, page_ms=0, layout="hashed"))
    assert json.loads((tmp_path / "plan.json").read_text()) == record.to_dict()
    assert record.objects == [10_000, 12_345]
    assert record.one_list["listed"] == record.many_lists["listed"] == 12_345
    for num_objects, new, indexing, done in zip(
        record.objects, record.all_new, record.indexing, record.mostly_done, strict=True
    ):
        assert (new["listed"], new["to_label"], new["already_done"]) == (num_objects, num_objects, 0)
        num_new = -(-num_objects // NEW_OF)
        for each in (indexing, done):
            assert (each["to_label"], each["already_done"]) == (num_new, num_objects - num_new)
            assert each["num_parts"] == 1
        assert new["peak_bytes"] > 0
    assert "12,345" in "\n".join(record.summary())


@pytest.mark.parametrize("layout", simulated_s3.LAYOUTS)
def test_keys_of_the_simulated_store_are_in_order(layout: str) -> None:
    keys = simulated_s3.Objects(700_000, layout)
    assert all(low < high for low, high in pairwise(keys[::97]))
    assert all(low < high for low, high in pairwise(keys[-2000:]))
    assert keys[len(keys) - 1] == keys[-1:][0]
    with pytest.raises(IndexError):
        keys[700_000]


def test_pages_of_the_simulated_store() -> None:
    lister = simulated_s3.Lister(["a b.jpg", "d/1+.jpg", "d/2.jpg", "é.jpg"])
    page = lister.page({"delimiter": "/", "max-keys": "2"}).decode()
    assert "<Key>a%20b.jpg</Key>" in page
    assert "<CommonPrefixes><Prefix>d/</Prefix></CommonPrefixes>" in page
    assert "<IsTruncated>true</IsTruncated>" in page
    token = page.partition("<NextContinuationToken>")[2].partition("<")[0]
    rest = lister.page({"delimiter": "/", "continuation-token": token}).decode()
    assert "<Key>%C3%A9.jpg</Key>" in rest
    assert rest.count("<Key>") == 1
    assert lister.page({"prefix": "d/", "start-after": "d/1+.jpg"}).decode().count("<Key>") == 1


def test_rows_are_those_of_predict() -> None:
    table = rows_of(["photos/a.jpg", "photos/b.jpg"], [1, 2])
    assert table.schema.equals(PREDICTIONS_SCHEMA, check_metadata=True)
    table.validate(full=True)
    assert set(table["label"].to_pylist()) <= {"cat", "dog"}
