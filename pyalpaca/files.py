"""Writing that leaves the old result or the new one, never half of it: to a temporary sibling, flushed, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""The ending of what is still being written."""


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling to write; on success it takes the name `path`, on failure it is removed."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(final.name + PARTIAL)
    try:
        yield partial
        sync(partial)
        os.replace(partial, final)
        sync(final.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary sibling folder to fill; on success its content appears under `path`, on failure it is removed.

    A `path` that does not exist or is empty appears at once, whole. In a folder with files of its own, the new files replace
    those of the same name one by one and the others stay. ValueError if `path` is a file.
    """
    final = Path(path).absolute()
    if final.exists() and not final.is_dir():
        raise ValueError(f"{final}: is a file, expected a folder or nothing; choose another output folder")
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        written = sorted(f for f in partial.rglob("*") if f.is_file())
        for file in written:
            sync(file)
        if not final.exists() or not any(final.iterdir()):
            os.replace(partial, final)
        else:
            for file in written:
                target = final / file.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        sync(final)
        sync(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
