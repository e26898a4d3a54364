"""What machine a benchmark ran on, and the limits that its results are held against."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyalpaca


def machine() -> dict[str, Any]:
    """The machine as a benchmark's JSON names it: processor, cores, torch's threads, memory in bytes, versions, commit, day."""
    import torch

    return {
        "cpu": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyalpaca": pyalpaca.__version__,
        "commit": _commit(Path(pyalpaca.__file__).parents[1]),
        "date": datetime.date.today().isoformat(),
    }


def limits(seconds: float = 0.5) -> dict[str, float]:
    """This machine's own rates, each measured for some seconds: fp32 matrix products in flop/s, copying memory in bytes/s.

    sgemm_flops: two flops for each multiplication of 2048 x 2048. copy_bytes: read and written bytes, of 128 MB.
    """
    import torch

    a, source = torch.randn(2048, 2048), torch.randn(32 * 2**20)
    product, target = torch.empty_like(a), torch.empty_like(source)
    sgemm = _median_seconds(lambda: torch.mm(a, a, out=product), seconds)
    copy = _median_seconds(lambda: target.copy_(source), seconds)
    return {"sgemm_flops": rounded(2 * 2048**3 / sgemm), "copy_bytes": rounded(2 * 4 * source.numel() / copy)}


def rounded(value: float, digits: int = 4) -> float:
    """The number with as many significant digits as a measurement is worth."""
    return float(f"{value:.{digits}g}")


def _median_seconds(call: Callable[[], object], seconds: float) -> float:
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def cores() -> int | None:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def processor() -> str:
    """The processor's name as Linux gives it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "CPU part"))]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int | None:
    """Bytes of main memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _commit(root: Path) -> str | None:
    """The commit of a work tree, with a + if the package differs from it; None where there is no git."""
    try:
        done = [
            subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "pyalpaca", "csrc"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return done[0] + ("+" if done[1] else "")
