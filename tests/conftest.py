"""Fixtures that several test modules share."""

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
