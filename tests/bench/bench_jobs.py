"""Jobs for fresh processes whose memory is known beforehand."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from pathlib import Path

PEAK = 0.1  # seconds that a peak lasts, ten looks


def allocate(count: int) -> Callable[[], int]:
    """Hold `count` bytes for a moment and let them go."""

    def work() -> int:
        block = b"x" * count
        time.sleep(PEAK)
        return len(block)

    return work


def allocated_before(count: int) -> Callable[[], None]:
    """Hold `count` bytes before the work begins."""
    block = b"x" * count
    return lambda: time.sleep(PEAK * len(block) / count)


def look_at(path: str) -> Callable[[], int]:
    """Map a file and touch every page of it."""

    def work() -> int:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            touched = sum(view[i] for i in range(0, len(view), mmap.PAGESIZE))
            time.sleep(PEAK)
        return touched

    return work


def wait(imports: float, seconds: float) -> Callable[[], None]:
    """Take some time for the imports and some for the work."""
    time.sleep(imports)
    return lambda: time.sleep(seconds)


def talk(text: str) -> Callable[[], dict[str, str]]:
    """Print before and during the work."""
    print(text, flush=True)

    def work() -> dict[str, str]:
        print(text, flush=True)
        return {"said": text}

    return work


def changed(path: str) -> Callable[[], list[str]]:
    """What a file holds during the imports, and what during the work."""
    before = Path(path).read_text()
    return lambda: [before, Path(path).read_text()]


def fail(path: str) -> Callable[[], None]:
    """Say something, then fail."""

    def work() -> None:
        Path(path).read_bytes()

    return work
