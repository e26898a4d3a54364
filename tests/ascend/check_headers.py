"""Compile all launch code against torch_npu's own headers: `python tests/ascend/check_headers.py`, no device, no toolkit.

The wheel of torch_npu is downloaded once and unpacked under build/, not installed. Warnings are errors.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import torch

ROOT = Path(__file__).resolve().parents[2]
VERSION = "2.13.0"
UNPACKED = ROOT / "build/torch_npu" / VERSION


def npu_headers() -> Path:
    """The include folder of torch_npu; brought here if it is not."""
    include = UNPACKED / "torch_npu/include"
    if include.is_dir():
        return include
    partial = UNPACKED.with_name(f"{VERSION}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "-d", str(partial)]
    subprocess.run([*command, f"torch_npu=={VERSION}"], check=True)
    wheel = next(partial.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial, [name for name in archive.namelist() if name.startswith("torch_npu/include/")])
    wheel.unlink()
    partial.rename(UNPACKED)
    return include


def main() -> int:
    npu, torch_include = npu_headers(), Path(torch.__file__).parent / "include"
    system = [npu, npu / "third_party/acl/inc", torch_include, torch_include / "torch/csrc/api/include"]
    system += [Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{ROOT}/csrc"]
    flags += ['-DPYALPACA_SOC=""', '-DPYALPACA_TORCH_NPU_VERSION=""']
    flags += [part for folder in system for part in ("-isystem", str(folder))]
    sources = sorted((ROOT / "csrc/ascend/launch").glob("*.cpp"))

    def status(source: Path) -> int:
        return subprocess.run(["nice", "-n", "5", "g++", *flags, str(source)], check=False).returncode

    with ThreadPoolExecutor(2) as pool:
        if any(pool.map(status, sources)):
            return 1
    print(f"{len(sources)} files compile against torch_npu {VERSION} and torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
