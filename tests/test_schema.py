"""`catdog.schema`: every schema says its version; earlier versions are read, later ones are refused."""

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catdog import schema

FIELDS = [pa.field("uri", pa.string(), nullable=False), pa.field("size", pa.int32())]
FIRST = schema.versioned("things", 1, FIELDS)
SECOND = schema.versioned("things", 2, [*FIELDS, pa.field("colour", pa.string())])


def table(of: pa.Schema, **columns: list[object]) -> pa.Table:
    return pa.table({"uri": ["a", "b"], "size": [1, None], **columns}, schema=of)


@pytest.mark.parametrize("found", [FIRST, FIRST.remove_metadata()])
def test_an_earlier_version_is_read_with_nulls_for_what_it_lacks(found: pa.Schema) -> None:
    schema.check(found, SECOND)
    read = schema.conformed(table(found), SECOND)
    assert read.schema.equals(SECOND, check_metadata=True)
    assert read.to_pylist() == [{"uri": "a", "size": 1, "colour": None}, {"uri": "b", "size": None, "colour": None}]


def test_some_columns_alone() -> None:
    wanted = pa.schema([SECOND.field("colour"), SECOND.field("uri")])
    assert schema.conformed(table(FIRST).select(["uri"]), wanted).to_pylist() == [
        {"colour": None, "uri": "a"},
        {"colour": None, "uri": "b"},
    ]


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        (SECOND, FIRST, "it is things/2, and this catdog reads things/1 to things/1"),
        (schema.versioned("others", 1, FIELDS), FIRST, "it is others/1, and this catdog reads things/1 to things/1"),
        (FIRST.remove(0), SECOND, "it lacks the column uri"),
        (FIRST.remove(1), FIRST, "it lacks the column size"),
        (FIRST.append(pa.field("b", pa.int8())), FIRST, "it has the unknown column b"),
        (FIRST.set(1, pa.field("size", pa.string())), FIRST, "its column size is string, not int32"),
    ],
)
def test_anything_else_is_refused(found: pa.Schema, expected: pa.Schema, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        schema.check(found, expected)


@pytest.mark.parametrize(
    ("its_schema", "mark"),
    [
        (schema.DATASET_SCHEMA, b"dataset/1"),
        (schema.REJECTS_SCHEMA, b"rejects/1"),
        (schema.PREDICTIONS_SCHEMA, b"predictions/3"),
    ],
)
def test_every_schema_says_its_version(its_schema: pa.Schema, mark: bytes) -> None:
    assert its_schema.metadata == {b"catdog.schema": mark}


@pytest.mark.parametrize(
    ("version", "lacking"), [(1, {"remark", "review_reason"}), (2, {"review_reason"}), (3, set[str]())]
)
def test_the_version_that_has_these_columns(version: int, lacking: set[str]) -> None:
    columns = [name for name in schema.PREDICTIONS_SCHEMA.names if name not in lacking]
    found = schema.predictions_with(columns)
    assert found.names == columns
    assert found.metadata == {b"catdog.schema": b"predictions/%d" % version}
    assert schema.predictions_with(["uri", "source_version", *columns[-3:]]).names == schema.predictions_with([]).names


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "string": st.text(),
    "float": st.floats(width=32, allow_nan=False),
    "bool": st.booleans(),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "timestamp[us, tz=UTC]": st.datetimes(datetime(1677, 9, 22), datetime(9999, 1, 1)).map(
        lambda t: t.replace(tzinfo=UTC)
    ),
}
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            field.name: st.none() | VALUES[str(field.type)] if field.nullable else VALUES[str(field.type)]
            for field in schema.PREDICTIONS_SCHEMA
        }
    ),
    max_size=20,
)


@given(ROWS)
def test_a_table_of_rows_is_pyarrows(rows: list[dict[str, Any]]) -> None:
    made = schema.table_of(rows, schema.PREDICTIONS_SCHEMA)
    made.validate(full=True)
    assert made.equals(pa.Table.from_pylist(rows, schema=schema.PREDICTIONS_SCHEMA), check_metadata=True)
