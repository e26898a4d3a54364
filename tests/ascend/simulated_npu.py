"""A machine with CANN, torch_npu and an NPU, as far as one can be made without: the device's part is the emulation.

The toolkit's CMake module and compiler (toolkit/) compile kernels for the emulation, torch_npu is its own headers with a library
of the few functions that launches call, and torch's device "npu" has the emulation's guarded memory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from check_headers import VERSION, npu_headers
from emulation import EMU, ROOT, build_library

TOOLKIT = Path(__file__).with_name("toolkit")


@dataclass(frozen=True)
class Machine:
    """Where its toolkit and its packages are, and the environment variables that say so."""

    toolkit: Path
    packages: Path
    environment: dict[str, str]


def simulated_npu(folder: Path, soc: str = "ascend910b2") -> Machine:
    """Such a machine in `folder`; what has to be compiled for it is compiled."""
    toolkit, packages = folder / "cann", folder / "site-packages"
    for part in ("tools", "lib64", "bin"):
        shutil.copytree(TOOLKIT / part, toolkit / part)
    shutil.copyfile(build_library([])._name, toolkit / "lib64/libascendcl.so")
    package = packages / "torch_npu"
    (package / "lib").mkdir(parents=True)
    (package / "version.py").write_text(f"__version__ = '{VERSION}'\n")
    (package / "__init__.py").write_text((TOOLKIT / "torch_npu.py").read_text() + f"__version__ = {VERSION!r}\n")
    (package / "include").symlink_to(npu_headers())
    headers = npu_headers()
    system = [headers, headers / "third_party/acl/inc", Path(torch.__file__).parent / "include"]
    system.append(system[-1] / "torch/csrc/api/include")
    command = ["nice", "-n", "5", os.environ.get("CXX", "g++"), "-std=c++17", "-O0", "-fPIC", "-shared", "-w"]
    command += [part for include in system for part in ("-isystem", str(include))]
    command += [
        str(TOOLKIT / "device.cpp"),
        f"-L{toolkit}/lib64",
        "-lascendcl",
        "-Wl,-soname,libtorch_npu.so",
        f"-Wl,-rpath,{toolkit}/lib64",
    ]
    command += [f"-L{Path(torch.__file__).parent}/lib", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", str(package / "lib/libtorch_npu.so")], check=True)
    paths = [str(packages), str(ROOT)] + ([os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [])
    environment = os.environ | {
        "ASCEND_HOME_PATH": str(toolkit),
        "SOC_VERSION": soc,
        "PYALPACA_EMU": str(EMU),
        "PYTHONPATH": os.pathsep.join(paths),
        "LD_LIBRARY_PATH": str(toolkit / "lib64"),
    }
    return Machine(toolkit, packages, environment)
