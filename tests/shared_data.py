"""Real files that are too large for the repository: from $ANYMAMBA_DATA, or `shared/data` beside the repository."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("ANYMAMBA_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def shared(path: str) -> Path:
    """The file or folder `path` of the shared data; skips the test where it is absent."""
    found = ROOT / path
    if not found.exists():
        pytest.skip(f"needs {path}, which is not in {ROOT}: set ANYMAMBA_DATA to a folder that has it")
    return found
