"""The device under test: waiting for it, emptying its caches, and what a call takes of its memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pyalpaca.bench.process import status
from pyalpaca.ops import release_memory

Call = Callable[[], object]
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_RESIDENT = ("RssAnon", "RssFile", "RssShmem")


@dataclass(frozen=True)
class Device:
    """name: `cpu` or `npu`. synchronize: wait until all work is done. flush: have nothing of the inputs in a cache.

    peak: runs a call and says how many bytes of memory it took at most, beyond what was held before; None where the system
    does not tell.
    """

    name: str
    synchronize: Callable[[], None]
    flush: Callable[[], None]
    peak: Callable[[Call], int | None]


def open_device(name: str, flush_bytes: int | None = None) -> Device:
    """`cpu`, or `npu` through torch_npu. flush_bytes: written to empty the caches, by default four times the last level."""
    if name == "npu":
        return _npu(import_module("torch_npu").npu, flush_bytes or 512 << 20)
    return Device("cpu", lambda: None, _flusher(flush_bytes or 4 * last_level_cache(), "cpu"), cpu_peak)


def _npu(npu: Any, flush_bytes: int) -> Device:
    def peak(call: Call) -> int:
        npu.synchronize()
        npu.reset_peak_memory_stats()
        before = npu.memory_allocated()
        call()
        npu.synchronize()
        return int(npu.max_memory_allocated() - before)

    return Device("npu", npu.synchronize, _flusher(flush_bytes, "npu"), peak)


def _flusher(count: int, device: str) -> Callable[[], None]:
    buffer = torch.zeros(count // 4, dtype=torch.float32, device=device)

    def flush() -> None:
        buffer.add_(1.0)

    return flush


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor; 32 MB where the system does not tell."""
    sizes = [path.read_text(encoding="ascii").strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def cpu_peak(call: Call) -> int | None:
    """The growth of this process's resident memory during a call: VmHWM, reset just before, less what was resident then.

    Free memory that malloc and the operators' pool hold is given back first, so that a call which takes it again is seen to:
    ours and the peers' start alike, as in a process where nothing was freed before.
    """
    release_memory()
    _trim()
    before = sum(status().get(field, 0) for field in _RESIDENT)
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        call()
        return None
    call()
    return max(status()["VmHWM"] - before, 0)


def result_bytes(result: object) -> int:
    """Of the tensors in what a call has returned."""
    if isinstance(result, torch.Tensor):
        return result.nbytes
    return sum(map(result_bytes, result)) if isinstance(result, (tuple, list)) else 0


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
