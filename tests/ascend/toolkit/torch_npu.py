"""A stand-in for the package torch_npu: the device "npu" of device.cpp, with no operators of its own."""

import ctypes
from pathlib import Path
from types import ModuleType

import torch

ctypes.CDLL(str(Path(__file__).parent / "lib/libtorch_npu.so"), mode=ctypes.RTLD_GLOBAL)
npu = ModuleType("torch.npu")
npu.is_available = lambda: True
npu.device_count = lambda: 1
npu.current_device = lambda: 0
npu._is_in_bad_fork = lambda: False
npu._lazy_init = lambda: None
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
