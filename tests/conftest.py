"""Fixtures that several test modules share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs that lies beside the project; skips where it is missing."""
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip("needs the photographs of ../shared/data, which are not here")
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The architectures of `small_architectures`, known by their names."""
    import keras
    import small_architectures

    from catdog.architectures import ARCHITECTURES

    for name, architecture in small_architectures.made().items():
        monkeypatch.setitem(ARCHITECTURES, name, architecture)
    yield
    keras.config.set_dtype_policy("float32")
