"""`catdog.provenance`: versions, configurations without secrets, and errors in one line."""

import dataclasses

import pytest

from catdog import __version__, provenance
from catdog.config import EvaluateConfig, PredictConfig


def test_redact() -> None:
    assert provenance.redact("ftp://me:secret@host/a: no") == "ftp://***@host/a: no"
    assert provenance.redact("https://h/a.jpg?X-Amz-Signature=secret&b=1") == "https://h/a.jpg?***"
    assert provenance.redact("s3://bucket/what?.jpg and /a@b") == "s3://bucket/what?.jpg and /a@b"


def test_a_configuration_is_plain_and_complete_and_has_no_secrets() -> None:
    config = EvaluateConfig(data="https://me:secret@host/d", output="o", model="https://h/m?sig=secret")
    assert provenance.configuration(config) == {
        "data": "https://***@host/d",
        "output": "o",
        "model": "https://h/m?***",
        "split": "test",
        "batch_size": 64,
        "engine": "auto",
        "use_gpu": False,
    }
    predicting = PredictConfig(images="i", output="o")
    assert list(provenance.configuration(predicting)) == [field.name for field in dataclasses.fields(predicting)]
    with pytest.raises(TypeError, match=r"^configuration takes a configuration dataclass\. Received: 3$"):
        provenance.configuration(3)


def test_lists_are_redacted_too() -> None:
    @dataclasses.dataclass
    class Config:
        images: tuple[str, ...]

    assert provenance.configuration(Config(("a", "s3://k:s@b"))) == {"images": ["a", "s3://***@b"]}


def test_versions_and_host_tell_what_can_change_a_result() -> None:
    versions = provenance.versions()
    assert versions["catdog"] == __version__
    assert {"python", "numpy", "pillow", "pyarrow", "tensorflow"} <= set(versions)
    host = provenance.host()
    assert host["num_cores"] >= 1
    assert host["cpu"]
    assert set(host) == {"cpu", "num_cores", "system"}  # and no name


def test_an_error_in_one_line() -> None:
    assert provenance.one_line(ValueError("two\n  lines")) == "two lines"
    assert provenance.one_line(ValueError()) == "ValueError"
    assert provenance.one_line("x" * 1000) == "x" * 300
    assert provenance.one_line("a name\udc80") == "a name\\udc80"
