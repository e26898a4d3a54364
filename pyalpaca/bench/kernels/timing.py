"""Timing: the contestants one after another in turn, so that noise hits all alike; after an emptied cache and with a full one."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from pyalpaca.bench.kernels.device import Call, Device, result_bytes

_WARM_SLICE = 0.01  # seconds of calls with a full cache after each with an empty one
_MOST_IN_SLICE = 50
_LONG = 0.1  # seconds of a call to which the caches matter so little that it is made once a round


@dataclass(frozen=True)
class Budget:
    """seconds: of each contestant in one row. rounds: at least so many.

    slow: a call longer than this is timed but once, after the one for its memory; and by that one itself if it took longer than
    `longest`.
    """

    seconds: float = 0.25
    rounds: int = 3
    slow: float = 0.4
    longest: float = 4.0


@dataclass
class Samples:
    """Of one contestant: seconds of single calls after the cache was emptied and behind one another, page faults of the latter.

    peak: bytes of memory that a call took at most, of which its result has so many.
    """

    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)
    peak: int | None = None
    result: int = 0
    spent: float = 0.0

    @property
    def seconds(self) -> float:
        return statistics.median(self.warm)

    @property
    def cold_seconds(self) -> float | None:
        return statistics.median(self.cold) if self.cold else None

    @property
    def spread(self) -> float:
        """The middle half of the warm timings over their median: 0 if all are alike."""
        if len(self.warm) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.warm, n=4, method="inclusive")
        return (high - low) / self.seconds


def take_turns(calls: Mapping[str, Call], device: Device, budget: Budget) -> dict[str, Samples]:
    """{name: Samples} of functions without arguments.

    Each is called once for its memory; then rounds whose order is turned round each time, until everyone has had its seconds
    and rounds.
    """
    found = {name: Samples() for name in calls}
    with _no_collection():
        slow = {name for name, call in calls.items() if _first(call, found[name], device, budget)}
        names = [name for name in calls if name not in slow]
        turn = 0
        while waiting := [n for n in names if found[n].spent < budget.seconds or len(found[n].cold) < budget.rounds]:
            for name in waiting if turn % 2 == 0 else reversed(waiting):
                _round(calls[name], found[name], device)
            turn += 1
    return found


def _first(call: Call, samples: Samples, device: Device, budget: Budget) -> bool:
    """The call before the rounds; whether it was so slow that there are to be none."""

    def watched() -> None:
        before, start = _faults(), time.perf_counter()
        samples.result = result_bytes(call())
        device.synchronize()
        samples.warm.append(time.perf_counter() - start)
        samples.faults.append(_faults() - before)

    samples.peak = device.peak(watched)
    seconds = samples.seconds
    if seconds <= budget.longest:  # it was given fresh memory alone: no time to go by
        samples.warm.clear()
        samples.faults.clear()
    if budget.slow < seconds <= budget.longest:
        watched()
    return seconds > budget.slow


def _round(call: Call, samples: Samples, device: Device) -> None:
    start = time.perf_counter()
    device.flush()
    device.synchronize()
    before = _faults()
    samples.cold.append(_timed(call, device))
    if samples.cold[-1] > _LONG:
        samples.warm.append(samples.cold[-1])
        samples.faults.append(_faults() - before)
        samples.spent += time.perf_counter() - start
        return
    end = time.perf_counter() + _WARM_SLICE
    for _ in range(_MOST_IN_SLICE):
        before = _faults()
        samples.warm.append(_timed(call, device))
        samples.faults.append(_faults() - before)
        if time.perf_counter() > end:
            break
    samples.spent += time.perf_counter() - start


def _timed(call: Call, device: Device) -> float:
    """Seconds until the work is done and its result given up, which is part of what it costs."""
    start = time.perf_counter()
    call()
    device.synchronize()
    return time.perf_counter() - start


def _faults() -> int:
    """Page faults of this process so far that took no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def median_rate(call: Callable[[], object], amount: float, seconds: float, device: Device) -> float:
    """`amount` per second of a call that is repeated for some seconds, by the median of at least five."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        times.append(_timed(call, device))
    return amount / statistics.median(times)
