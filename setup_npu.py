"""Builds pyalpaca._C_npu, the kernels for Ascend NPUs, with CANN's toolkit: csrc/ascend/CMakeLists.txt driven with make.

ASCEND_HOME_PATH (or ASCEND_TOOLKIT_HOME), which the toolkit's set_env.sh sets, asks for it. From then on whatever is absent or
does not compile ends the installation with one message: a package that lacks its kernels unnoticed is worse than none.

PYALPACA_NPU_ROUTE says how the kernels are compiled: `ascendc` with the functions of ascendc.cmake, which is what happens
unasked, `asc` with Ascend C as a language of CMake (the package ASC of newer toolkits).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

KERNELS = "libpyalpaca_npu_kernels.so"
BUILD_INFO = "_C_npu.build.json"
ROUTE = "PYALPACA_NPU_ROUTE"
# What each route needs of the toolkit, and where releases keep it.
CMAKE_FILES = {"ascendc": "ascendc.cmake", "asc": "asc-config.cmake"}
CMAKE_FOLDERS = {
    "ascendc": (
        "tools/tikcpp/ascendc_kernel_cmake",
        "compiler/tikcpp/ascendc_kernel_cmake",
        "ascendc_devkit/tikcpp/samples/cmake",
    ),
    "asc": (
        "lib64/cmake",
        "compiler/tikcpp/ascendc_kernel_cmake",
        "tools/tikcpp/ascendc_kernel_cmake",
        "tikcpp/ascendc_kernel_cmake",
    ),
}
OLDEST_TOOLKIT = {"ascendc": "8.1 or newer", "asc": "9.0 or newer"}
# `ascend910b` alone names the first generation, which the kernels do not run on.
SOC = re.compile(r"ascend910b[1-4](c|-1)?|ascend910_93\w\w")
SOCS = "ascend910b1, ascend910b2, ascend910b3, ascend910b4 or ascend910_93xx"
OTHERWISE = "or unset ASCEND_HOME_PATH to install without the kernels for NPUs"


@dataclass(frozen=True)
class Toolkit:
    """CANN on this machine, the processor to compile for, and by which route."""

    folder: Path
    cmake: Path
    soc: str
    route: str


@dataclass(frozen=True)
class TorchNpu:
    """An installed torch_npu, read without importing it."""

    folder: Path
    version: str


def toolkit_asked() -> Path | None:
    """The toolkit's folder as the environment names it; None where it names none."""
    named = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    return Path(named) if named else None


def find_route() -> str:
    """How the kernels are to be compiled, as the variable PYALPACA_NPU_ROUTE says; one message for what there is not."""
    route = os.environ.get(ROUTE) or "ascendc"
    if route not in CMAKE_FILES:
        raise SystemExit(
            f"pyalpaca: {ROUTE} is {route!r}, expected ascendc (the functions of ascendc.cmake) or asc (Ascend C as a language "
            "of CMake); set it to one of them or unset it for ascendc"
        )
    return route


def find_toolkit(folder: Path) -> Toolkit:
    """The toolkit in `folder` if kernels can be compiled with it; else one message."""
    route = find_route()
    name, places = CMAKE_FILES[route], CMAKE_FOLDERS[route]
    cmake = next((folder / place for place in places if (folder / place / name).is_file()), None)
    if cmake is None:
        instead = "" if route == "ascendc" else f"unset {ROUTE}, "
        raise SystemExit(
            f"pyalpaca: no {name} found in {folder} (looked in {', '.join(places)}), expected CANN's toolkit "
            f"{OLDEST_TOOLKIT[route]}; install it and source its set_env.sh, {instead}{OTHERWISE}"
        )
    if shutil.which("make") is None:
        raise SystemExit(f"pyalpaca: make not found, needed to compile the kernels for NPUs; install it, {OTHERWISE}")
    return Toolkit(folder, cmake, find_soc(), route)


def find_soc() -> str:
    """The processor to compile for: SOC_VERSION, else what npu-smi finds; one message for any that the kernels do not know."""
    asked = os.environ.get("SOC_VERSION")
    found = (asked or _soc_of_this_machine()).lower()
    if not found:
        raise SystemExit(f"pyalpaca: no NPU found by npu-smi, expected one or its name in the variable SOC_VERSION: {SOCS}")
    if SOC.fullmatch(found) is None:
        where = "SOC_VERSION is" if asked else "npu-smi found"
        raise SystemExit(f"pyalpaca: {where} {found!r}, expected {SOCS}; set SOC_VERSION to one of them, {OTHERWISE}")
    return found


def _soc_of_this_machine() -> str:
    """As SOC_VERSION is written: 910B2 is told as a chip's name, 910_9392 as a chip's and the NPU's."""
    listed = re.search(r"NPU ID\s*:\s*(\d+)", _npu_smi("-l"))
    if listed is None:
        return ""
    board = _npu_smi("-t", "board", "-i", listed[1], "-c", "0")
    fields = dict(re.findall(r"^\s*(Chip Name|NPU Name)\s*:\s*(\S+)\s*$", board, re.MULTILINE))
    name = fields.get("Chip Name", "").removeprefix("Ascend")
    npu = fields.get("NPU Name", "NA")
    return f"ascend{name}" + ("" if npu == "NA" else f"_{npu}") if name else ""


def _npu_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(["npu-smi", "info", *arguments], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def find_torch_npu(folders: Iterable[Path], torch_version: str) -> TorchNpu | None:
    """The torch_npu of the same minor version as torch in one of `folders`; None if none of them has any, else one message."""
    found: list[TorchNpu] = []
    for folder in folders:
        version = folder / "torch_npu/version.py"
        if version.exists():
            match = re.search(r"^__version__ = ['\"]([^'\"]+)", version.read_text(), re.MULTILINE)
            if match:
                found.append(TorchNpu(folder / "torch_npu", match[1]))
    wanted = _minor(torch_version)
    for torch_npu in found:
        if _minor(torch_npu.version) == wanted:
            return torch_npu
    if found:
        raise SystemExit(
            f"pyalpaca: found torch_npu {found[0].version} in {found[0].folder} beside torch {torch_version}, "
            f"expected {wanted}.*; `pip install 'torch_npu=={wanted}.*'`, {OTHERWISE}"
        )
    return None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def check_torch_npu(torch_npu: TorchNpu | None, torch_version: str) -> TorchNpu:
    """`torch_npu` if there is one, with its headers; else one message."""
    install = f"`pip install 'torch_npu=={_minor(torch_version)}.*'` first"
    if torch_npu is None:
        raise SystemExit(f"pyalpaca: no torch_npu found, expected one to compile the launches against; {install}, {OTHERWISE}")
    if not (torch_npu.folder / "include/torch_npu").is_dir():
        raise SystemExit(f"pyalpaca: torch_npu {torch_npu.version} in {torch_npu.folder} has no C++ headers; {install}")
    return torch_npu


def compile_npu(
    source: Path, build: Path, toolkit: Toolkit, torch_npu: TorchNpu, options: dict[str, str], cmake: str
) -> list[Path]:
    """Run CMake and make in the folder `build`; the module's file and its library of kernels. One message if either fails."""
    options = options | {
        "ASCEND_CANN_PACKAGE_PATH": str(toolkit.folder),
        "SOC_VERSION": toolkit.soc,
        "PYALPACA_NPU_ROUTE": toolkit.route,
        "PYALPACA_ASCENDC_CMAKE": str(toolkit.cmake),
        "PYALPACA_TORCH_NPU": str(torch_npu.folder),
        "PYALPACA_TORCH_NPU_VERSION": torch_npu.version,
    }
    configure = [cmake, "-G", "Unix Makefiles", "-S", str(source), "-B", str(build), *(f"-D{k}={v}" for k, v in options.items())]
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = os.environ | {"ASCEND_HOME_PATH": str(toolkit.folder)}  # the package ASC reads this one only
    for command in (configure, [cmake, "--build", str(build), "--parallel", str(jobs)]):
        if subprocess.run(command, env=environment, check=False).returncode != 0:
            other = f"try {ROUTE}={'asc' if toolkit.route == 'ascendc' else 'ascendc'}, "
            raise SystemExit(
                f"pyalpaca: compiling the kernels for {toolkit.soc} with {toolkit.folder} failed, see above; mend what it names, "
                f"{other}{OTHERWISE}"
            )
    return [next((build / "out").glob("_C_npu*.so")), build / "out" / KERNELS]
