"""Which modules may import which modules and libraries, checked on the import statements themselves."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "catdog"

# From the ground up. A module imports from the lines above its own; modules on one line stand side by side.
LAYERS = [
    {"errors"},
    {"schema"},
    {"config", "failpoints", "portions"},
    {"hardware", "scratch"},
    {"provenance"},
    {"ray_internals"},
    {"ray_session"},
    {"storage"},
    {"tiff"},
    {"images"},
    {"metrics"},
    {"calibration", "neither"},
    {"records"},
    {"report"},
    {"architectures"},
    {"augment"},
    {"openvino_ir"},
    {"bundle"},
    {"engines"},
    {"quantization"},
    {"labelling"},
    {"dataset", "training", "inference", "serving"},
    {"tuning"},
    {"evaluation", "conversion"},
    {"drawings"},
    {"bench"},
    {"demo"},
    {"streams"},
    {"cli"},
    {"__main__"},
]
# The readers of a dataset's shards are `dataset`'s.
SIDEWAYS = {("training", "dataset")}

# Libraries that are met only in their owners. The longest name that fits an import counts.
OWNERS = {
    "argparse": {"cli"},
    "botocore": {"storage"},
    "docstring_parser": {"cli"},
    "duckdb": {"bench", "dataset", "inference"},
    "fastapi": {"bench", "serving"},
    "fsspec": {"storage"},
    "imagehash": {"dataset"},
    "jinja2": {"report"},
    "keras": {"architectures", "bench", "bundle", "openvino_ir", "training"},
    "matplotlib": {"report"},
    "nncf": {"openvino_ir"},
    "obstore": {"storage"},
    "openvino": {"openvino_ir"},
    "optuna": {"tuning"},
    "prometheus_client": {"serving"},
    "pydantic": {"serving"},
    "python_multipart": {"serving"},
    "PIL": {"tiff", "images", "report", "dataset", "drawings"},  # all but `images` only draw: see below
    "pillow_heif": {"images"},
    "ray": {"ray_session", "ray_internals", "dataset", "training", "tuning", "inference", "serving", "bench"},
    "ray.data": {"dataset", "training", "inference"},
    "ray.serve": {"serving"},
    "ray.train": {"ray_internals", "training", "tuning"},
    "ray.tune": {"tuning"},
    "s3fs": {"storage"},
    "starlette": {"serving"},
    "tensorflow": {"architectures", "augment", "bench", "engines", "hardware", "openvino_ir", "training"},
    "uvicorn": {"bench", "serving"},
}


def part_of(path: Path) -> str:
    """`catdog/cli.py` and `catdog/storage/urls.py` are parts of `cli` and `storage`; `catdog/__init__.py` of none."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py").replace("__init__", "")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever it stands: for `from a import b` both `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def level(part: str) -> int:
    (found,) = (index for index, layer in enumerate(LAYERS) if part in layer)
    return found


def test_every_module_has_a_layer() -> None:
    assert {part_of(path) for path in files()} - {""} <= set().union(*LAYERS)


def test_imports_point_upwards() -> None:
    wrong = []
    for path in files():
        part = part_of(path)
        for line, module in imports(path):
            package, _, rest = module.partition(".")
            target = rest.partition(".")[0]
            if package != "catdog" or target in {"", part} or target.startswith("__") or (part, target) in SIDEWAYS:
                continue
            if part == "" or level(target) >= level(part):
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {module}")
    assert wrong == []


def test_libraries_are_met_only_in_their_owners() -> None:
    wrong = []
    for path in files():
        for line, module in imports(path):
            names = module.split(".")
            prefixes = [".".join(names[:length]) for length in range(len(names), 0, -1)]
            owned = next((prefix for prefix in prefixes if prefix in OWNERS), None)
            if owned is not None and part_of(path) not in OWNERS[owned]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {module}")
    assert wrong == []


@pytest.mark.parametrize("package", ["jobs", "tests"])
def test_nothing_in_the_library_imports(package: str) -> None:
    assert [path for path in files() if any(name.split(".")[0] == package for _, name in imports(path))] == []


def test_only_images_decodes() -> None:
    """One decoding path for training, batch and serving: nobody else opens an image file."""
    opening = []
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {"Image.open", "ImageFile.Parser"}:
                opening.append(path.relative_to(PACKAGE))
    assert {path.parts[0] for path in opening} == {"images"}
