"""What the devices can do at most: arithmetic, memory and links, as their makers publish it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Device:
    """The limits of a device.

    tflops: dense matrix products in fp16 and bf16 (on a CPU in fp32). memory: bytes; reserved: of them for kernels, drivers and
    communication. memory_rate, link_rate, network_rate: bytes per second of its own memory, to the other devices of its node,
    in one direction, and to other nodes. per_node: devices in a node.
    """

    name: str
    tflops: float
    memory: float
    memory_rate: float
    link_rate: float
    network_rate: float = 25e9  # 200 Gb/s a device
    per_node: int = 8
    reserved: float = 2e9


def _ascend(name: str, cores: int, gigahertz: float, memory: float = 64e9) -> Device:
    """Atlas A2: a core does 8192 fp16 operations a clock; seven links to its neighbours of 28 GB/s in each direction."""
    return Device(name, round(cores * 8192 * gigahertz / 1e3), memory, 1.6e12, 196e9)


DEVICES = {
    device.name: device
    for device in (
        _ascend("ascend910b1", 24, 1.85),
        _ascend("ascend910b2", 24, 1.8),
        _ascend("ascend910b3", 20, 1.8),
        _ascend("ascend910b4", 20, 1.5, 32e9),
        Device("a100-40gb", 312.0, 40e9, 1.555e12, 300e9),
        Device("a100", 312.0, 80e9, 2.039e12, 300e9),
    )
}


def known_tflops(name: str) -> float | None:
    """The published peak of a device by the name that its driver gives it, TFLOPs in fp16; None if it is not in the table."""
    word = name.lower().replace(" ", "").replace("_", "")
    return next((d.tflops for d in DEVICES.values() if d.name.removeprefix("ascend").split("-")[0] in word), None)


def free_memory() -> int | None:
    """Bytes of main memory that this process could still have, by its control group too; None where that is not known."""
    found = [_kilobytes(Path("/proc/meminfo"), "MemAvailable:"), *(_left(*names) for names in _CONTROL_GROUPS)]
    return min((value for value in found if value is not None), default=None)


_CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _kilobytes(path: Path, key: str) -> int | None:
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def _left(limit: str, used: str) -> int | None:
    """What a control group has left of its limit; its page cache, which counts as used, is given back when needed."""
    try:
        most = Path(limit).read_text().strip()
        return None if most == "max" else max(int(most) - int(Path(used).read_text()) + _cached(Path(used).parent), 0)
    except (OSError, ValueError):
        return None


def _cached(folder: Path) -> int:
    lines = (folder / "memory.stat").read_text().splitlines() if (folder / "memory.stat").exists() else []
    return sum(int(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "active_file"))


def this_machine(processes: int = 1) -> Device:
    """This machine's CPU as one of `processes` devices: free memory and rates are shared; measured for a tenth of a second."""
    import time

    import torch

    def best(call: object, times: int = 3) -> float:
        seconds = []
        for _ in range(times):
            began = time.perf_counter()
            call()  # type: ignore[operator]
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    a, source = torch.ones(768, 768), torch.ones(8 << 20)
    target = torch.empty_like(source)
    product = 2 * 768**3 / best(lambda: torch.mm(a, a))
    copy = 2 * source.nbytes / best(lambda: target.copy_(source))
    share = max(processes, 1)
    memory = free_memory() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", product / share / 1e12, memory / share, copy / share, copy / share / 2, copy / share / 2, share, 0.0)
