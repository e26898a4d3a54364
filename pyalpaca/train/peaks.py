"""What a device could do at most, which utilisation is a share of, and how much memory this process has taken."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from pyalpaca.plan import known_tflops


def peak_tflops(device: torch.device) -> float:
    """TFLOPs that the device reaches at most: published for some, else the best of a few matrix products (fp32 on a CPU)."""
    name = ""
    if device.type == "npu":
        import torch_npu

        name = torch_npu.npu.get_device_name(device)
    elif device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return known_tflops(name) or _measured(device)


def _measured(device: torch.device) -> float:
    size = 768 if device.type == "cpu" else 8192
    a = torch.ones(size, size, dtype=torch.float32 if device.type == "cpu" else torch.float16, device=device)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        product = torch.mm(a, a)
        product[0, 0].item()  # waits for an asynchronous device
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e12


def memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: of the device, on a CPU of the process (0 where that is not known)."""
    if device.type == "npu":
        import torch_npu

        return int(torch_npu.npu.max_memory_allocated(device))
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    # Not getrusage: its peak is inherited from the process that started this one.
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
