"""`pyalpaca doctor`: what was found on this machine, and which backend serves which operator and why."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec

from pyalpaca import __version__
from pyalpaca.bench.machine import cores, processor

_PACKAGES = ("torch", "torch_npu", "numpy", "sentencepiece", "safetensors", "matplotlib", "transformers", "peft", "deepspeed")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _first_line(command: list[str]) -> str:
    """The first line that a tool prints, or that it is not there."""
    if shutil.which(command[0]) is None:
        return "not found"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run ({error})"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0] if lines else f"runs, status {done.returncode}"


def _npu() -> str:
    toolkit = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    if not toolkit:
        return "none: ASCEND_HOME_PATH is not set (source CANN's set_env.sh on a machine with NPUs)"
    if find_spec("torch_npu") is None:
        return f"CANN in {toolkit}, but torch_npu is not installed: pip install 'pyalpaca[npu]'"
    try:
        import torch_npu

        return f"{torch_npu.npu.device_count()} devices, CANN in {toolkit}"
    except (ImportError, RuntimeError, OSError) as error:
        return f"CANN in {toolkit}, but torch_npu can't be loaded: {error}"


def _npu_kernels() -> str:
    from pyalpaca.ops import npu_kernels

    info, problem = npu_kernels()
    if info is None:
        return problem or "loaded"
    built = f"for {info['soc']}, built with torch_npu {info['torch_npu']} and CANN in {info['toolkit']}"
    return f"{built}; but {problem}" if problem else built


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; exit status 1 if an operator has no backend at all."""
    argparse.ArgumentParser(prog="pyalpaca doctor", description=__doc__).parse_args(argv)
    import torch

    from pyalpaca.ops import backend_report

    rows = [("pyalpaca", __version__), ("Python", f"{platform.python_version()} ({sys.executable})")]
    rows += [(name, _version(name)) for name in _PACKAGES]
    rows += [
        ("processor", f"{processor()}, {cores()} cores"),
        ("torch threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')})"),
        ("torch kernels", torch.backends.cpu.get_cpu_capability()),
        ("CUDA", f"{torch.cuda.device_count()} devices" if torch.cuda.is_available() else "none"),
        ("NPU", _npu()),
        ("NPU kernels", _npu_kernels()),
        ("C++ compiler", _first_line([os.environ.get("CXX", "c++"), "--version"])),
        ("cmake", _first_line(["cmake", "--version"])),
        ("ninja", _first_line(["ninja", "--version"])),
    ]
    for name, value in rows:
        print(f"{name:<16}{value}")
    print(f"\n{'operator':<24}{'backend':<11}why")
    report = backend_report()
    for row in report:
        print(f"{row.operator:<24}{row.backend:<11}{row.reason}")
    return 1 if any(row.backend == "none" for row in report) else 0
