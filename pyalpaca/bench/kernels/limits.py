"""What this machine can do at most: products of matrices, copying and reading memory, each by the best of several ways."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from pyalpaca.bench.kernels.device import Call, Device
from pyalpaca.bench.kernels.operator import Work
from pyalpaca.bench.kernels.timing import median_rate
from pyalpaca.bench.machine import rounded
from pyalpaca.ops import extension

_MOSTLY_READ = 0.1
"""Who writes less than this share of what is read is held to the rate of reading, everyone else to that of copying."""


@dataclass(frozen=True)
class Limits:
    """compute: the name of the product, `sgemm`, or `matmul` on an NPU. flops: of it per second. copy, read: bytes per second.

    probes: the rate found by each way that was tried; the limits are the best of each kind. ways: the best way of each kind,
    as what it counts in one call and the call, to be taken again in turn with what is held against it.
    """

    compute: str
    flops: float
    copy: float
    read: float
    probes: Mapping[str, float]
    ways: Mapping[str, tuple[float, Call]]

    def rate(self, kind: str) -> float:
        """Per second, of a limit by the name that `bound` gives it."""
        return {self.compute: self.flops, "copy": self.copy, "read": self.read}[kind]

    def bound(self, work: Work) -> tuple[str, float]:
        """(which limit, seconds): the longer of what the flops and what the bytes take at full speed."""
        kind = "read" if work.written < _MOSTLY_READ * work.read else "copy"
        computing, moving = work.flops / self.flops, work.moved / self.rate(kind)
        return (self.compute, computing) if computing > moving else (kind, moving)

    def summary(self) -> dict[str, float]:
        """As the JSON object has them."""
        return {f"{self.compute}_flops": self.flops, "copy_bytes": self.copy, "read_bytes": self.read}


def measure_limits(device: Device, memory_bytes: int = 256 << 20, seconds: float = 0.4) -> Limits:
    """The limits of a device. memory_bytes: of each of the two buffers, far above any cache; seconds: of each way."""
    cpu = device.name == "cpu"
    compute = "sgemm" if cpu else "matmul"
    ways: dict[str, tuple[float, Call]] = {}
    sizes = (1024, 2048) if cpu else (4096, 8192)
    for size in sizes if memory_bytes >= 64 << 20 else sizes[:1]:
        a = torch.randn(size, size).to(device.name, torch.float32 if cpu else torch.float16)
        out = torch.empty_like(a)
        ways[f"{compute}/{size}"] = 2.0 * size**3, _product(a, out)
    for name, count, call in _memory_ways(*(_buffer(memory_bytes, device.name) for _ in range(2))):
        ways[name] = float(count), call
    probes = {name: rounded(median_rate(call, amount, seconds, device)) for name, (amount, call) in ways.items()}
    best = {kind: max((n for n in probes if n.startswith(kind)), key=probes.__getitem__) for kind in (compute, "copy", "read")}
    rates = {kind: probes[name] for kind, name in best.items()}
    ways = {kind: ways[name] for kind, name in best.items()}
    return Limits(compute, rates[compute], rates["copy"], rates["read"], probes, ways)


def _product(a: Tensor, out: Tensor) -> Call:
    return lambda: torch.mm(a, a, out=out)


def _buffer(count: int, device: str) -> Tensor:
    """Bytes of memory in use, as fp32: every page is there, and where the system grants them they are huge ones."""
    if device != "cpu" or sys.platform != "linux":
        return torch.ones(count // 4, device=device)
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)


def _memory_ways(a: Tensor, b: Tensor) -> Iterator[tuple[str, int, Call]]:
    """(name, bytes counted, call): copying counts what is read and what is written, as STREAM does (McCalpin 1995)."""
    count = a.nbytes
    yield "copy/torch.copy_", 2 * count, lambda: b.copy_(a)
    yield "copy/torch.add", 2 * count, lambda: torch.add(a, 1.0, out=b)
    yield "read/torch.amax", count, lambda: a.amax()
    yield "read/torch.dot", 2 * count, lambda: torch.dot(a, b)
    if a.device.type != "cpu":
        return
    ours = extension.module()
    yield "copy/streamed", 2 * count, lambda: ours.copy_memory(a.data_ptr(), b.data_ptr(), count)
    yield "read/streamed", count, lambda: ours.read_memory(a.data_ptr(), count)
    if sys.platform == "linux":
        libc, threads = ctypes.CDLL(None), torch.get_num_threads()
        part = count // threads // 64 * 64
        starts = [i * part for i in range(threads)]
        source, target = a.data_ptr(), b.data_ptr()

        def memcpy(start: int) -> None:
            libc.memcpy(ctypes.c_void_p(target + start), ctypes.c_void_p(source + start), ctypes.c_size_t(part))

        def memchr(start: int) -> None:
            libc.memchr(ctypes.c_void_p(source + start), 1, ctypes.c_size_t(part))  # 1.0 has no byte 1: all is read

        # The C library's own (past the caches, where it finds that right), in one thread each: ctypes lets go of the lock.
        pool = ThreadPoolExecutor(threads)
        yield "copy/memcpy", 2 * part * threads, lambda: list(pool.map(memcpy, starts))
        yield "read/memchr", part * threads, lambda: list(pool.map(memchr, starts))
