"""An old result, to be written over."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with a file that will be written anew, and others that won't."""
    out = tmp_path / "out"
    (out / "deep" / "er").mkdir(parents=True)
    for name in ("config.json", "mine", "deep/mine", "deep/er/mine"):
        (out / name).write_text("old")
    return out
