"""Room on the disk, in numbers that people read, and said to be too little before anything is written."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def human_size(size: float) -> str:
    """`13.48 GB` for a number of bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:.0f} bytes"


def free_space(path: str | Path) -> int:
    """Bytes that this user may still write where `path` lies or will lie; sys.maxsize if that file system doesn't say."""
    existing = Path(os.path.realpath(path))
    while not existing.exists():
        existing = existing.parent
    found = os.statvfs(existing)
    return found.f_bavail * found.f_frsize if found.f_blocks else sys.maxsize


def require_space(path: str | Path, needed: int) -> None:
    """ValueError if fewer than `needed` bytes are free where `path` is to be written.

    An old result does not count as free: it stays until the new one is whole.
    """
    free = free_space(path)
    if free < needed:
        raise ValueError(
            f"{path}: {human_size(needed)} are to be written, but {human_size(free)} are free there; "
            f"free {human_size(needed - free)} or choose a place on another disk"
        )
