"""What is written in these tests, and how a folder is looked at."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pyalpaca.files import atomic_file, atomic_folder, replace


def tree(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


def inode(path: Path) -> int:
    return path.lstat().st_ino


WRITTEN = {"config.json": "new", "deep/b": "new", "mine": "old", "deep/mine": "old", "deep/er/mine": "old"}


def write_new(out: Path) -> None:
    with atomic_folder(out) as partial:
        (partial / "deep").mkdir()
        for name in ("config.json", "deep/b"):
            (partial / name).write_text("new")


def write_file(path: Path) -> None:
    with atomic_file(path) as partial:
        partial.write_text("new")


def refuse_exchange(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    """As on a file system without it."""

    def refuse(a: Path, b: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(replace, "exchange", refuse)
