"""Jobs for fresh processes whose memory is known beforehand."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
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


def operator_peaks(cases: Sequence[tuple[str, Sequence[int], str, str]]) -> Callable[[], dict[str, dict[str, int | None]]]:
    """The peak memory of ours and of plain torch for (operator, sizes, dtype, direction), after a call of the small shape."""
    import torch

    from pyalpaca.bench.kernels.device import cpu_peak
    from pyalpaca.bench.kernels.measure import prepared
    from pyalpaca.bench.kernels.operator import Case
    from pyalpaca.bench.kernels.records import OPERATORS

    def work() -> dict[str, dict[str, int | None]]:
        torch.manual_seed(0)
        found: dict[str, dict[str, int | None]] = {}
        for name, sizes, dtype, direction in cases:
            operator = OPERATORS[name]
            plain = next(peer for peer in operator.peers if peer.name == "plain")
            small = next(shape for label, shape in operator.shapes.items() if label.startswith("small/"))
            for who, function in (("ours", operator.ours), ("plain", plain.build())):
                prepared(function, operator.make(Case(small, dtype)), direction)()
                inputs = operator.make(Case(tuple(sizes), dtype))
                found.setdefault(f"{name}/{direction}", {})[who] = cpu_peak(prepared(function, inputs, direction))
        return found

    return work
