"""`catdog.storage.inventory`: S3's own list of a bucket gives what a listing of it gives."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
from s3_server import S3Server
from storage_case import fill

from catdog import storage
from catdog.errors import UsageError
from catdog.storage import SourceFile, inventory
from catdog.storage.patterns import Chosen

pytest_plugins = ["s3_server", "storage_case"]

EMPTY = pa.schema({"bucket": pa.string(), "key": pa.string(), "is_latest": pa.bool_()})
NAMES = ["a/1.jpg", "a b/c+d é#1.jpg", "notes.txt", ".hidden/2.jpg", "b/100%.png"]


def written(kind: str, rows: list[dict[str, object]]) -> tuple[bytes, str]:
    """A data file, and the `fileSchema` of it."""
    if kind == "CSV":
        from urllib.parse import quote_plus

        lines = [
            [str(value) for value in {**row, "key": quote_plus(str(row["key"]), safe="/")}.values()] for row in rows
        ]
        text = "".join(",".join(f'"{value}"' for value in line) + "\n" for line in lines)
        return gzip.compress(text.encode()), "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, ETag"
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows, None if rows else EMPTY)
    pq.write_table(table, sink) if kind == "Parquet" else pyarrow.orc.write_table(table, sink)
    return sink.getvalue(), "as the file says"


def write_inventory(bucket: str, at: str, kind: str, files: list[SourceFile], **changes: object) -> str:
    name = bucket.removeprefix("s3://")
    rows = [
        {
            "bucket": name,
            "key": file.uri.removeprefix(bucket + "/"),
            "version_id": "x",
            "is_latest": True,
            "is_delete_marker": False,
            "size": file.num_bytes,
            "e_tag": file.version,
        }
        for file in files
    ]
    rows += [{**rows[0], "is_latest": False}, {**rows[0], "is_delete_marker": True}, {**rows[0], "key": "a/"}]
    data, schema = written(kind, rows)
    suffix = {"CSV": "csv.gz"}.get(kind, kind.lower())
    storage.publish_bytes(f"{bucket}/inventory/data/1.{suffix}", data)
    storage.publish_bytes(f"{bucket}/inventory/data/2.{suffix}", written(kind, rows[:0])[0])
    manifest = {
        "sourceBucket": name,
        "destinationBucket": f"arn:aws:s3:::{name}",
        "fileFormat": kind,
        "fileSchema": schema,
        "files": [
            {"key": f"inventory/data/{number}.{suffix}", "size": len(data), "MD5checksum": "x"} for number in (2, 1)
        ],
        **changes,
    }
    Path(at).write_text(json.dumps(manifest)) if at.startswith("/") else storage.publish_json(at, manifest)
    return at


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["CSV", "Parquet", "ORC"])
def test_it_lists_what_the_bucket_lists(s3: S3Server, tmp_path: Path, kind: str) -> None:
    bucket = s3.new_bucket()
    fill(bucket, {name: name.encode() for name in NAMES})
    files = list(storage.list_images(bucket))
    for at in (f"{bucket}/inventory/manifest.json", f"{tmp_path}/manifest.json"):
        listing = storage.list_images(write_inventory(bucket, at, kind, files))
        assert list(listing) == files
        assert listing.skipped == {inventory.OLD_VERSION: 2}
    chosen = storage.list_images(at, chosen=Chosen(include=("a/**",)), skip_others=True)
    assert [file.uri for file in chosen] == [f"{bucket}/a/1.jpg"]
    sifted = storage.list_images(at, skip_others=True)
    assert [file.uri for file in sifted] == [file.uri for file in files if not file.uri.endswith("notes.txt")]
    without = [SourceFile(file.uri, "", 0) for file in files]
    assert list(storage.list_images(write_inventory(bucket, at, kind, without))) == files  # looked up one by one


def test_another_manifest_json_is_a_table_or_an_error(tmp_path: Path) -> None:
    table = tmp_path / "manifest.json"
    table.write_text('{"path": "1.jpg"}\n{"path": "2.jpg"}\n')
    assert [file.uri for file in storage.list_images(str(table))] == [f"{tmp_path}/1.jpg", f"{tmp_path}/2.jpg"]
    table.write_text('{"sourceBucket": "b", "fileFormat": "XML", "fileSchema": "", "files": []}')
    with pytest.raises(UsageError, match=r"An S3 Inventory must be in CSV, Parquet or ORC\. Received: \S+ with xml$"):
        list(storage.list_images(str(table)))
