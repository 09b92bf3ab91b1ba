"""What a run finds in its rows: histograms, examples, and a checksum that DuckDB computes likewise."""

import random
from typing import Any

import duckdb
import pytest
from test_inference_comparison import row

from catdog import schema
from catdog.inference.findings import (
    CONFIDENCE_EDGES,
    NUM_ERRORS,
    NUM_NEITHER,
    NUM_UNCERTAIN,
    ROW_NUMBER_SQL,
    Findings,
    add,
    findings,
    nothing,
)


def found_in(rows: list[dict[str, Any]]) -> Findings:
    return findings(schema.table_of(rows, schema.PREDICTIONS_SCHEMA))


def some_rows(num: int, seed: int = 0) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    rows = []
    for number in range(num):
        prob_dog = None if chance.random() < 0.1 else chance.random()
        reason = None if prob_dog is None else chance.choice([None, None, "neither", "unsure"])
        rows.append(row(f"{seed}/{number}.jpg", prob_dog, review_reason=reason, needs_review=reason is not None))
    return rows


def test_confidence_falls_into_the_bin_whose_lower_edge_it_has() -> None:
    rows = [row(f"{edge}", edge) for edge in CONFIDENCE_EDGES]
    counts = found_in(rows)["confidence"]
    assert counts["cat"] == [0] * (len(CONFIDENCE_EDGES) - 1)
    assert sum(counts["dog"]) == len(rows)
    assert counts["dog"][0] == 1
    assert counts["dog"][-1] == 2  # 0.999 and 1


def test_photographs_of_neither_do_not_count_for_the_accuracy() -> None:
    rows = [
        row("1.jpg", 0.75),
        row("2.jpg", 0.25),
        row("3.jpg", 1.0, review_reason="neither", needs_review=True),
    ]
    found = found_in(rows)
    assert (found["judged"], found["confidence_sum"], found["confidence_variance"]) == (2, 1.5, 0.375)
    assert [each["uri"] for each in found["neither"]] == ["3.jpg"]
    assert [each["uri"] for each in found["uncertain"]] == ["1.jpg", "2.jpg"]
    assert found["review_reasons"] == {"neither": 1}


def test_the_sum_does_not_depend_on_the_slices_nor_on_their_order() -> None:
    rows = some_rows(300)
    whole = found_in(rows)
    for size in (1, 7, 120):
        pieces = [found_in(rows[start : start + size]) for start in range(0, len(rows), size)]
        random.Random(size).shuffle(pieces)
        total = nothing()
        for piece in pieces:
            add(total, piece)
        assert total["confidence_sum"] == pytest.approx(whole["confidence_sum"])
        assert total["confidence_variance"] == pytest.approx(whole["confidence_variance"])
        for key in ("confidence", "judged", "review_reasons", "checksum", "uncertain", "neither", "errors"):
            assert total[key] == whole[key], key


def test_examples_are_few() -> None:
    found = found_in(some_rows(1000))
    assert len(found["uncertain"]) == NUM_UNCERTAIN
    assert len(found["neither"]) == NUM_NEITHER
    assert {code: len(examples) for code, examples in found["errors"].items()} == {"truncated": NUM_ERRORS}
    confidences = [each["confidence"] for each in found["uncertain"]]
    assert confidences == sorted(each or 0.0 for each in confidences)


def test_duckdb_computes_the_same_checksum() -> None:
    rows = [
        *some_rows(200),
        row("tab\t and “quotes” and \\ and ünï", 1e-9),
        row("", 0.999999, image_id=None, source_version=""),
        row("same", 0.5),
        row("same", 0.5, source_version="2"),
    ]
    table = schema.table_of(rows, schema.PREDICTIONS_SCHEMA)
    query = f"SELECT sum({ROW_NUMBER_SQL}) FILTER (status = 'ok') FROM rows"
    with duckdb.connect() as database:
        database.register("rows", table)
        ((total,),) = database.execute(query).fetchall()
    assert int(total) % 2**64 == findings(table)["checksum"]


def test_the_checksum_sees_every_change() -> None:
    rows = some_rows(20)
    rows = [each for each in rows if each["status"] == "ok"]
    before = found_in(rows)["checksum"]
    for changes in (
        {"uri": "other"},
        {"source_version": "2"},
        {"image_id": "other"},
        {"label": "dog" if rows[0]["label"] == "cat" else "cat"},
        {"prob_dog": rows[0]["prob_dog"] + 1e-6},
        {"model_id": "other"},
    ):
        assert found_in([rows[0] | changes, *rows[1:]])["checksum"] != before, changes
    assert found_in(rows[1:])["checksum"] != before
    assert found_in([*rows, rows[0]])["checksum"] != before
