"""`catdog.storage.manifests`, `tables` and `embedded`: tables of every format name images, or hold them."""

import bz2
import gc
import gzip
import io
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from storage_case import fill, image_error

from catdog import storage
from catdog.errors import UsageError
from catdog.storage import embedded, manifests, outages, tables
from catdog.storage.manifests import Columns

pytest_plugins = ["s3_server", "storage_case"]

Rows = Sequence[dict[str, object]]


def delimited(delimiter: str) -> Callable[[Rows], bytes]:
    def write(rows: Rows) -> bytes:
        lines = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
        return "\r\n".join(map(delimiter.join, lines)).encode()

    return write


def parquet(rows: Rows) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return bytes(sink.getvalue())


WRITERS: dict[str, Callable[[Rows], bytes]] = {
    "csv": delimited(","),
    "tsv": delimited("\t"),
    "tab": delimited("\t"),
    "txt": lambda rows: "\n".join(str(row["filename"]) for row in rows).encode(),
    "jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "ndjson": lambda rows: "\r\n".join(map(json.dumps, rows)).encode(),
    "json": lambda rows: "\n\n".join(map(json.dumps, rows)).encode(),
    "parquet": parquet,
    "parq": parquet,
    "pq": parquet,
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:]),
    ".bz2": bz2.compress,
    ".ZST": lambda data: pa.compress(data, "zstd", asbytes=True),
}
ROWS = [{"width": 3, "filename": f"b/{number}.jpg", "category": "cat"} for number in range(3)]


def uris(url: str | Path, columns: Columns | None = None) -> list[str]:
    return [file.uri for file in storage.list_images(str(url), columns=columns)]


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
def test_formats(tmp_path: Path, suffix: str, compression: str, begin: bytes) -> None:
    """Fault 35."""
    if WRITERS[suffix] is parquet:
        begin = b""
    fill(str(tmp_path), {f"b/{number}.jpg": b"x" * number for number in range(1, 3)})
    table = tmp_path / f"list.{suffix}{compression}"
    table.write_bytes(COMPRESSIONS[compression](begin + WRITERS[suffix](ROWS)))
    files = list(storage.list_images(str(table)))
    assert [file.uri for file in files] == [f"{tmp_path}/b/{number}.jpg" for number in range(3)]
    assert [file.num_bytes for file in files] == [0, 1, 2]
    assert [bool(file.version) for file in files] == [False, True, True]


def test_on_each_storage(root: str) -> None:
    fill(root, {"a.jpg": b"1", "d/b.jpg": b"22", "l/x.csv.gz": gzip.compress(b"path\n../a.jpg\n../d/b.jpg\n")})
    assert uris(f"{root}/l/x.csv.gz") == [f"{root}/a.jpg", f"{root}/d/b.jpg"]
    assert uris(f"{root}/l/*.csv.gz") == uris(f"{root}/l/x.csv.gz")


@pytest.mark.parametrize(
    ("names", "is_manifest"),
    [
        (["0.parquet", "1.parq", "_SUCCESS", "_delta_log/0.json"], True),
        (["year=2025/0.parquet", "year=2026/0.parquet"], True),
        (["part-0000.csv", "part-0001.csv", "_SUCCESS"], True),
        (["part-0000.json.gz"], True),
        (["part.0.txt"], True),
        (["labels.csv"], False),
        (["read.txt"], False),
        (["0.parquet", "z.jpg"], False),
        (["0.parquet", "README.md", "LICENSE"], True),
        (["LICENSE", "README.md"], False),
        (["_SUCCESS"], False),
    ],
)
def test_which_directory_is_a_manifest(tmp_path: Path, names: list[str], is_manifest: bool) -> None:
    for name in names:
        suffix = Path(name).name.removesuffix(".gz").rpartition(".")[2]
        data = WRITERS[suffix]([{"filename": "/x/1.jpg"}]) if suffix in WRITERS else b""
        storage.publish_bytes(f"{tmp_path}/{name}", gzip.compress(data) if name.endswith(".gz") else data)
    data_files = sorted(name for name in names if not name.startswith(("_", "README", "LICENSE")))
    if is_manifest:
        assert uris(tmp_path) == ["/x/1.jpg"] * len(data_files)
    else:
        assert uris(tmp_path) == sorted(f"{tmp_path}/{name}" for name in names)
    found = [f"{tmp_path}/{name}" for name in data_files]
    assert storage.listing.find_tables(str(tmp_path)) == (found if is_manifest else None)


def test_globs_of_tables(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", "c.txt", "d.jpg"):
        (tmp_path / name).write_bytes(b"path\n/x/1.jpg\n")
    assert uris(f"{tmp_path}/*.csv") == ["/x/1.jpg"] * 2
    assert uris(f"{tmp_path}/{{a,b}}.{{csv,tsv}}") == ["/x/1.jpg"] * 2
    assert uris(f"{tmp_path}/*.txt") == [f"{tmp_path}/path", "/x/1.jpg"]
    assert uris(f"{tmp_path}/*") == [f"{tmp_path}/{name}" for name in ("a.csv", "b.csv", "c.txt", "d.jpg")]
    assert uris(f"{tmp_path}/[a]*") == [f"{tmp_path}/a.csv"]


@pytest.mark.parametrize("name", [*tables.COLUMN_NAMES["uri"], "URI", "File_Name", " path "])
def test_names_of_the_column(tmp_path: Path, name: str) -> None:
    (tmp_path / "t.csv").write_bytes(f"label,{name}\ncat,/x/1.jpg\n".encode())
    assert uris(tmp_path / "t.csv") == ["/x/1.jpg"]


def test_which_column_is_meant(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(b"id,path,URL\n1,/x/1.jpg,/y/1.jpg\n")
    with pytest.raises(
        UsageError, match=r"^--uri-column must say which column is meant. Received: \S+ with path, URL$"
    ):
        uris(table)
    assert uris(table, Columns(uri="url")) == ["/y/1.jpg"]
    assert uris(table, Columns(uri="id")) == [f"{tmp_path}/1"]
    with pytest.raises(
        UsageError, match=r"^--uri-column must name a column. Received: --uri-column=x, and \S+ with id"
    ):
        uris(table, Columns(uri="x"))
    table.write_bytes(b"/x/1.jpg,cat\n")
    with pytest.raises(
        UsageError, match=r"must have a column named uri, path, .*\. Received: \S+ with the columns /x/"
    ):
        uris(table)


def test_semicolons_of_excel_and_line_ends_in_quotes(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes('\ufeffnote;path\r\n"two\nlines; and more";/x/é.jpg\r\n'.encode())
    assert uris(tmp_path / "t.csv") == ["/x/é.jpg"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("t.parquet", b"not Parquet at all", r"must be what its name says: .*Parquet"),
        ("t.csv.gz", b"not compressed", r"must be whole: zlib inflate failed"),
        ("t.csv.gz", gzip.compress(b"path\n" + b"/x/1.jpg\n" * 50, mtime=0)[:-9], r"must be whole: Truncated"),
        ("t.csv", b"path,label\n1,2\n3\n", r"must be what its name says: .*Row #3: Expected 2 columns, got 1"),
        ("t.csv", b"path\n\xe9.jpg\n", r"not csv in UTF-8, as which it must be saved"),
        ("t.csv", "path\n1\n".encode("utf-16-le"), r"must have a column named uri"),
        ("t.jsonl", b'{"path": "1"}\n[1]\n', r"one object a line. Received: \S+, whose row 2 is '\[1\]'"),
        ("t.json", b'[\n{"path": "1"},\n2]\n', r"must be one of objects. Received: \S+, row 2 is 2$"),
        ("t.json", b'[\n{"path": "1"}\n', r"must be one of objects. Received: \S+, which is not JSON: "),
        (
            "t.jsonl",
            b'{"path": {"a": 1}}\n',
            r"--uri-column must be a column of names.*whose row 1 has the path \"{'a'",
        ),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=words):
        uris(tmp_path / name)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_unicode_text_of_excel(tmp_path: Path, encoding: str, suffix: str) -> None:
    """UTF-16 with a mark at its beginning, with tabs, and named .txt."""
    text = "\ufeff" * (encoding == "utf-16-be") + "Category\tFile_Name\r\ncat\tköter/1.jpg\r\n"
    for name in ("t.txt", "t.tsv"):
        path = tmp_path / (name + suffix)
        path.write_bytes(COMPRESSIONS[suffix](text.encode(encoding)))
        assert uris(path) == [f"{tmp_path}/köter/1.jpg"]
    path = tmp_path / ("t.jsonl" + suffix)
    path.write_bytes(
        COMPRESSIONS[suffix](("\ufeff" * (encoding == "utf-16-be") + '{"path": "é.jpg"}').encode(encoding))
    )
    assert uris(path) == [f"{tmp_path}/é.jpg"]


def test_a_txt_with_the_header_of_a_table(tmp_path: Path) -> None:
    fill(str(tmp_path), {"1.jpg": b"1"})
    (tmp_path / "t.txt").write_text("label, filename\ncat, 1.jpg\n")
    assert uris(tmp_path / "t.txt") == [f"{tmp_path}/1.jpg"]
    (tmp_path / "t.txt").write_text("label, cat.jpg\n2.jpg\n")  # no header: each line is a path
    assert uris(tmp_path / "t.txt") == [f"{tmp_path}/label, cat.jpg", f"{tmp_path}/2.jpg"]


def test_a_json_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.dumps([{"path": f"{number}.jpg", "label": "cat"} for number in range(3)], indent=1).encode()
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf \n" + data)
    assert uris(tmp_path / "t.json") == [f"{tmp_path}/{number}.jpg" for number in range(3)]
    monkeypatch.setattr(tables, "MAX_ARRAY_BYTES", 50)
    with pytest.raises(UsageError, match=r"A JSON array must have at most 50 bytes; write one object a line instead"):
        uris(tmp_path / "t.json")


def test_what_else_a_column_of_names_is_called(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,label\n1.jpg,0\n")
    assert uris(tmp_path / "t.csv") == [f"{tmp_path}/1.jpg"]
    (tmp_path / "t.csv").write_text("id,image,label\n7,1.jpg,0\n")
    assert uris(tmp_path / "t.csv") == [f"{tmp_path}/1.jpg"]


def parquet_bytes(**columns: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        *(("t.csv", data) for data in (b"", b"\n\n", b"path\n", b"path\n\n")),
        *(("t.jsonl", data) for data in (b"", b"\n")),
        ("t.txt", b""),
        ("t.csv.gz", gzip.compress(b"", mtime=0)),
        *(("t.parquet", data) for data in (parquet_bytes(), parquet_bytes(uri=[]))),
    ],
)
def test_an_empty_table(tmp_path: Path, name: str, data: bytes) -> None:
    """On a night without new images there may be neither rows nor the names of columns."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=r"--images must hold at least one file"):
        uris(tmp_path / name)
    assert list(storage.list_images(str(tmp_path / name), allow_empty=True)) == []


@pytest.mark.parametrize(("name", "data"), [("t.csv", b"\n\na.jpg\n"), ("t.jsonl", b"{}\n")])
def test_a_table_without_names_that_has_rows(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match="must have a column named"):
        list(storage.list_images(str(tmp_path / name), allow_empty=True))


def test_a_row_that_names_nothing_is_its_own_error(tmp_path: Path) -> None:
    """Fault 35."""
    pq.write_table(pa.table({"uri": ["/x/1.jpg", None, " "]}), tmp_path / "t.parquet")
    table = f"{tmp_path}/t.parquet"
    assert uris(table) == ["/x/1.jpg", f"row://uri/000000002::{table}", f"row://uri/000000003::{table}"]
    error = image_error(f"row://uri/000000002::{table}")
    assert (error.code, str(error)) == ("not_found", "the row names no file")
    (tmp_path / "t.csv").write_bytes(b"path,label\n,cat\n1.jpg,dog\n")
    assert uris(tmp_path / "t.csv") == [f"row://path/000000001::{tmp_path}/t.csv", f"{tmp_path}/1.jpg"]
    assert image_error(f"row://path/000000001::{tmp_path}/t.csv").code == "not_found"


def test_spellings(tmp_path: Path) -> None:
    tmp_path /= "pets"
    nfd = unicodedata.normalize("NFD", "Zoë.jpg")
    fill(str(tmp_path), {"a/1 2.jpg": b"1", f"a/{nfd}": b"2", "b/é.jpg": b"3"})
    written = [
        "a\\1 2.jpg",
        " a/1 2.jpg ",
        f"file:{tmp_path}/a/1%202.jpg",
        f"file://{tmp_path}/a/1%202.jpg",
        "a/Zoë.jpg",
        unicodedata.normalize("NFD", "b\\é.jpg"),
        "C:\\Users\\me\\PETS\\a\\1 2.jpg",
        "c:/pets/b/é.jpg",
        "D:\\elsewhere\\a\\1 2.jpg",
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"path": path}) for path in written))
    files = list(storage.list_images(f"{tmp_path}/t.jsonl"))
    names = ["a/1 2.jpg"] * 4 + [f"a/{nfd}", "b/é.jpg", "a/1 2.jpg", "b/é.jpg", "D:\\elsewhere\\a\\1 2.jpg"]
    assert [file.uri for file in files] == [f"{tmp_path}/{name}" for name in names]
    assert [bool(file.version) for file in files] == [True] * 8 + [False]


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    name = tmp_path / "caf\udce9.jpg"
    name.write_bytes(b"1")
    (tmp_path / "t.txt").write_bytes(bytes(name) + b"\n")
    (file,) = storage.list_images(f"{tmp_path}/t.txt")
    assert file.uri == f"file://{tmp_path}/caf%E9.jpg"
    assert file.num_bytes == 1


def test_versions_spare_the_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Faults 35 and 52."""
    rows = [f's3://bucket/{number}.jpg,{number},"""e{number}"""' for number in range(3)]
    (tmp_path / "t.csv").write_text("\n".join(["uri,size,ETag", *rows, "1.jpg,7,x"]))
    monkeypatch.setattr("catdog.storage.listing.info", lambda *_: pytest.fail("a request"))
    (tmp_path / "1.jpg").write_bytes(b"12")
    *remote, local = storage.list_images(f"{tmp_path}/t.csv")
    assert [(file.version, file.num_bytes) for file in remote] == [("e0", 0), ("e1", 1), ("e2", 2)]
    assert (local.num_bytes, local.version.partition("-")[0]) == (2, "2")  # the disk is asked


def hugging_face(path: Path, images: Sequence[bytes | None], paths: Sequence[str | None], **columns: object) -> str:
    """A Parquet file as `datasets` writes it."""
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["dog", "cat"]}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": data, "path": name} for data, name in zip(images, paths, strict=True)]
    table = pa.table({"image": pa.array(rows, kind), **columns})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=100)
    return str(path)


def test_embedded_images(tmp_path: Path) -> None:
    images = [b"%d-" % number + b"x" * (number % 7) for number in range(250)]
    url = hugging_face(tmp_path / "train-00000.parquet", images, ["x.jpg"] * 250, label=[0] * 250)
    files = list(storage.list_images(url))
    assert len({file.version for file in files}) == 1
    assert files[0].version
    found = [file.uri for file in files]
    assert found == sorted(found)
    assert list(storage.read_sources(found, None, [file.version for file in files])) == images
    assert [storage.read_source(found[row]) for row in (249, 3, 120, 17, 16, 248)] == [
        images[row] for row in (249, 3, 120, 17, 16, 248)
    ]
    assert storage.storage_of(found[0]) == ""
    assert storage.absolute(found[0]) == found[0]
    assert [file.uri for file in storage.list_images(found[3])] == [found[3]]
    assert image_error(embedded.row_uri("image", 251, url)).code == "not_found"
    assert image_error(embedded.row_uri("nothing", 1, url)).code == "not_found"
    hugging_face(Path(url), [b"other"], ["x.jpg"])
    assert str(image_error_of(found[0], files[0].version)) == "the table has changed since it was listed"
    assert storage.read_source(found[0]) == b"other"


def image_error_of(uri: str, version: str) -> Exception:
    (error,) = storage.read_sources([uri], None, [version])
    assert isinstance(error, Exception)
    return error


@pytest.mark.parametrize("suffix", ["parquet", "parquet.gz"])
def test_rows_that_hold_an_image_or_name_one(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"outside")
    url = hugging_face(tmp_path / "t.parquet", [b"inside", None, None, b""], [None, "a.jpg", None, None])
    if suffix == "parquet.gz":
        url += ".gz"
        Path(url).write_bytes(gzip.compress((tmp_path / "t.parquet").read_bytes()))
    found = uris(url)
    assert found[1] == f"{tmp_path}/a.jpg"
    codes = [data if isinstance(data, bytes) else data.code for data in storage.read_sources(found)]
    assert codes == [b"inside", b"outside", "not_found", "empty_file"]
    embedded._open_tables.clear()
    gc.collect()  # a file that is left open is a warning, which is an error


def test_embedded_images_on_each_storage(root: str, tmp_path: Path) -> None:
    images = [b"%d" % number for number in range(150)]
    local = hugging_face(tmp_path / "x.parquet", images, [None] * 150)
    storage.publish_bytes(f"{root}/d/x.parquet", Path(local).read_bytes())
    files = list(storage.list_images(f"{root}/d"))
    assert list(storage.read_sources([file.uri for file in files], None, [file.version for file in files])) == images
    assert storage.storage_of(files[0].uri) == storage.storage_of(root)
    assert storage.is_inside(files[0].uri, root)


def test_a_remote_table_is_read_while_only_one_request_may_be_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow reads on threads of its own, which must not wait for those who wait for them."""
    fsspec.filesystem("memory").store.clear()
    table = pa.table({"image": [{"bytes": b"%d" % number, "path": None} for number in range(100)]})
    storage.publish_parquet("memory://narrow/t.parquet", table)
    files = list(storage.list_images("memory://narrow"))
    narrow = outages.known("memory://narrow/t.parquet")
    monkeypatch.setattr(narrow, "_limit", 1.0)
    monkeypatch.setattr(outages, "MAX_CONNECTIONS", 1)
    images = storage.read_sources([file.uri for file in files], None, [file.version for file in files])
    assert list(images) == [b"%d" % number for number in range(100)]


def test_columns_of_bytes_and_names_of_classes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"1", None], "label": [1, 0]}), tmp_path / "t.parquet")
    rows = next(manifests.read_rows([f"{tmp_path}/t.parquet"], Columns(), "label"))
    assert [(row.number, row.image_bytes is None, row.label) for row in rows] == [(1, False, 1), (2, True, 0)]
    url = hugging_face(tmp_path / "h.parquet", [b"1", b"2", b"3"], [None] * 3, label=[0, 1, -1])
    rows = next(manifests.read_rows([url], Columns(), "label"))
    assert [row.label for row in rows] == ["dog", "cat", -1]


def test_long_tables_stream(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"path\n" + b"".join(b"%d.jpg\n" % (row % 3) for row in range(100_000)))
    with tables.open_table(f"{tmp_path}/t.csv") as table:
        sizes = [len(batch) for batch in table.batches(["path"])]
    assert sum(sizes) == 100_000
    assert max(sizes) <= tables.BATCH_ROWS


def test_a_copy_of_a_repository_of_hugging_face(tmp_path: Path) -> None:
    fill(str(tmp_path), {"README.md": b"#", ".gitattributes": b"x", "LICENSE": b"x", "dataset_infos.json": b"{}"})
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"image": [{"bytes": b"1", "path": "x"}]}), tmp_path / "data/train-00000-of-00001.parquet")
    assert uris(tmp_path) == [f"row://image/000000001::{tmp_path}/data/train-00000-of-00001.parquet"]
    fill(str(tmp_path), {"data/1.jpg": b"x"})
    assert len(uris(tmp_path)) == 5  # beside a photograph, a table is just another file
