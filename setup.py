"""Builds the extension pyalpaca._C: CMakeLists.txt driven with ninja and pybind11, against the torch it will run with.

Where CANN's toolkit is, pyalpaca._C_npu is built too (setup_npu.py).

pip builds in an isolated environment by default, with its own packages. A torch installed there, of another version than the
one beside which pyalpaca will live, would give an extension that does not load. So torch is looked for where pyalpaca is going
to be installed, isolated or not; only if there is none does an isolated build ask for one (setup_requires).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip runs this file without its folder on the path

import setup_npu  # noqa: E402

OLDEST_TORCH = (2, 10)  # has the stable C interface to its thread pool that csrc/cpu/threads.cpp calls
TESTED_TORCH = "torch==2.13.0"
OLDEST_SETUPTOOLS = 77  # knows licences by name
BUILD_INFO = "_C.build.json"
MODELLED_SOURCES = ("emu/include", "emu/src", "ascend/kernels", "ascend/tiling", "ascend/launch")
BUILD_TOOLS = ("cmake", "ninja", "pybind11")
DEPENDENCIES = [
    "numpy>=1.23",
    "sentencepiece>=0.1.99",
    "safetensors>=0.4",
    "gguf>=0.17",
    "tqdm>=4.60",
    "tomli>=2; python_version < '3.11'",
]


@dataclass(frozen=True)
class Torch:
    """An installed torch, read without importing it."""

    folder: Path
    version: str

    @property
    def minor(self) -> tuple[int, int]:
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    @property
    def include(self) -> list[Path]:
        return [self.folder / "include", self.folder / "include/torch/csrc/api/include"]

    @property
    def cxx11_abi(self) -> int:
        config = self.folder / "share/cmake/Torch/TorchConfig.cmake"
        found = re.search(r"_GLIBCXX_USE_CXX11_ABI=(\d)", config.read_text()) if config.exists() else None
        return int(found.group(1)) if found else 1


def check_setuptools(version: str) -> None:
    """One message for a setuptools that can't read pyproject.toml, as new environments of Python 3.11 have it."""
    if int(version.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"pyalpaca: found setuptools {version}, expected {OLDEST_SETUPTOOLS} or newer; `pip install -U setuptools`, "
            "or leave out --no-build-isolation"
        )


def package_folders(package: str) -> list[Path]:
    """Where to look for a package: where pyalpaca will be installed, then the build environment."""
    spec = find_spec(package)
    folders = [Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib")), *map(Path, site.getsitepackages())]
    return folders + ([Path(spec.origin).parents[1]] if spec and spec.origin else [])


def find_torch() -> Torch | None:
    """The torch beside which pyalpaca will be installed, else one of the build environment, else None."""
    for candidate in (folder / "torch" for folder in package_folders("torch")):
        version = candidate / "version.py"
        if version.exists():
            found = re.search(r"^__version__ = ['\"]([^'\"]+)", version.read_text(), re.MULTILINE)
            if found:
                return Torch(candidate, found.group(1))
    return None


def check_torch(torch: Torch | None) -> Torch:
    """`torch` if the extension can be built with it; else one message."""
    if torch is None:
        raise SystemExit(
            f"pyalpaca: no torch found in {sysconfig.get_path('purelib')}, expected one to build against; "
            f"`pip install {TESTED_TORCH}` first, or leave out --no-build-isolation"
        )
    if torch.minor < OLDEST_TORCH:
        raise SystemExit(
            f"pyalpaca: found torch {torch.version} in {torch.folder}, expected {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer; "
            f"`pip install {TESTED_TORCH}` first"
        )
    if not (torch.folder / "include/ATen").is_dir():
        raise SystemExit(f"pyalpaca: torch {torch.version} in {torch.folder} has no C++ headers; `pip install {TESTED_TORCH}`")
    return torch


def torch_requirement(torch: Torch | None) -> str:
    """The range of torch that the built extension loads with: C++ symbols change between minor versions."""
    if torch is None:
        return TESTED_TORCH
    major, minor = torch.minor
    return f"torch>={major}.{minor}.0,<{major}.{minor + 1}"


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX or the system's; else one message."""
    asked = os.environ.get("CXX")
    found = shlex.split(asked) if asked else next(([c] for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    advice = "install one (Debian, Ubuntu: `apt install g++`; openEuler: `yum install gcc-c++`) or name one in the variable CXX"
    if found is None:
        raise SystemExit(f"pyalpaca: no C++ compiler found (c++, g++, clang++), expected one that knows C++17; {advice}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <string_view>\nint main() { if constexpr (true) return std::string_view().size(); }\n")
        command = [*found, "-std=c++17", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            raise SystemExit(
                f"pyalpaca: {shlex.join(found)!r} does not compile C++17, expected a compiler that does; {advice}"
            ) from None
    return found


def check_tools() -> None:
    """One message if the tools of the build are absent, as they can be without build isolation."""
    absent = [tool for tool in BUILD_TOOLS if find_spec(tool) is None and not (tool != "pybind11" and shutil.which(tool))]
    if absent:
        raise SystemExit(
            f"pyalpaca: {', '.join(absent)} not found, needed to build; `pip install {' '.join(absent)}`, "
            "or leave out --no-build-isolation"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise SystemExit(f"pyalpaca: {header} not found; install Python's headers (Debian, Ubuntu: `apt install python3-dev`)")


def tool(name: str) -> str:
    """The program of the package `name`: the package's own, whatever PATH says, else PATH's."""
    if find_spec(name) is not None:
        module = __import__(name)
        own = Path(module.CMAKE_BIN_DIR if name == "cmake" else module.BIN_DIR) / name
        if own.is_file():
            return str(own)
    return shutil.which(name) or name


def forget_other_source(build: Path, source: Path) -> None:
    """Remove the folder `build` if it was configured for another source folder, as after a move: CMake refuses such a one."""
    cache = build / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={source}\n" not in cache.read_text():
        shutil.rmtree(build)


def cmake_options(torch: Torch, compiler: list[str]) -> dict[str, str]:
    """What both extensions want to know."""
    import pybind11

    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "PYALPACA_TORCH_INCLUDE": ";".join(str(folder) for folder in torch.include),
        "PYALPACA_TORCH_LIB": str(torch.folder / "lib"),
        "PYALPACA_CXX11_ABI": str(torch.cxx11_abi),
    }
    if "CXX" not in os.environ:
        options["CMAKE_CXX_COMPILER"] = shutil.which(compiler[0]) or compiler[0]
    return options


def compile_extension(torch: Torch, compiler: list[str], build: Path) -> Path:
    """Run CMake and ninja in the folder `build`; the extension's file. One message if either fails."""
    forget_other_source(build, ROOT)
    options = cmake_options(torch, compiler) | {"CMAKE_MAKE_PROGRAM": tool("ninja")}
    configure = [tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *(f"-D{k}={v}" for k, v in options.items())]
    for command in (configure, [tool("cmake"), "--build", str(build)]):
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"pyalpaca: compiling the extension failed, see above; the command was {shlex.join(command)}")
    return next(build.glob("_C*" + sysconfig.get_config_var("EXT_SUFFIX")))


def replace(source: Path, target: Path) -> None:
    """Copy in such a way that a process which has the old file open keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


class CMakeBuild(build_ext):
    """setuptools' build_ext with CMake in place of its compiler."""

    def build_extension(self, ext: Extension) -> None:
        check_tools()
        torch, compiler = check_torch(find_torch()), find_compiler()
        version = subprocess.run([*compiler, "--version"], check=False, capture_output=True, text=True).stdout.splitlines()
        info = {"torch": torch.version, "compiler": version[0] if version else compiler[0]}
        build = Path(self.build_temp).absolute()
        asked = setup_npu.toolkit_asked()
        if asked is not None and ext.name == "pyalpaca._C_npu":
            toolkit = setup_npu.find_toolkit(asked)
            torch_npu = setup_npu.find_torch_npu(package_folders("torch_npu"), torch.version)
            torch_npu = setup_npu.check_torch_npu(torch_npu, torch.version)
            source, build = ROOT / "csrc/ascend", build / f"npu-{torch.version}-{toolkit.soc}-{toolkit.route}"
            forget_other_source(build, source)
            options = cmake_options(torch, compiler)
            built = setup_npu.compile_npu(source, build, toolkit, torch_npu, options, tool("cmake"))
            info |= {"torch_npu": torch_npu.version, "soc": toolkit.soc}
            info |= {"toolkit": str(asked.resolve()), "route": toolkit.route}
            self.install(built, setup_npu.BUILD_INFO, info)
        else:
            self.install([compile_extension(torch, compiler, build / f"torch-{torch.version}")], BUILD_INFO, info)

    def install(self, files: list[Path], name: str, info: dict[str, str]) -> None:
        folder = Path(self.build_lib) / "pyalpaca"
        for file in files:
            replace(file, folder / file.name)
        (folder / name).write_text(json.dumps(info) + "\n", encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        for file in self.get_outputs():
            replace(Path(file), ROOT / "pyalpaca" / Path(file).name)

    def get_outputs(self) -> list[str]:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        names = [f"_C{suffix}", BUILD_INFO]
        if setup_npu.toolkit_asked() is not None:
            names += [f"_C_npu{suffix}", setup_npu.KERNELS, setup_npu.BUILD_INFO]
        return [str(Path(self.build_lib) / "pyalpaca" / name) for name in names]


class BuildPython(build_py):
    """setuptools' build_py, and into the package the sources that `pyalpaca bench ascend` compiles; a source tree has its own."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in MODELLED_SOURCES:
            shutil.copytree(ROOT / "csrc" / folder, Path(self.build_lib) / "pyalpaca/_csrc" / folder, dirs_exist_ok=True)
        shutil.copyfile(ROOT / "csrc/ascend/emulated.cpp", Path(self.build_lib) / "pyalpaca/_csrc/ascend/emulated.cpp")


def requirements_of_the_build(torch: Torch | None) -> list[str]:
    """What an isolated build has to bring, because it is not where pyalpaca will be installed."""
    absent = [] if torch else [TESTED_TORCH]
    if setup_npu.toolkit_asked() is not None:
        version = torch.version if torch else TESTED_TORCH.partition("==")[2]
        if setup_npu.find_torch_npu(package_folders("torch_npu"), version) is None:
            major, minor = version.split(".")[:2]
            absent.append(f"torch_npu=={major}.{minor}.*")
    return absent


if __name__ == "__main__":
    check_setuptools(setuptools.__version__)
    torch = find_torch()
    extensions = [*(["pyalpaca._C_npu"] if setup_npu.toolkit_asked() is not None else []), "pyalpaca._C"]
    setup(
        ext_modules=[Extension(name, sources=[]) for name in extensions],
        cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
        setup_requires=requirements_of_the_build(torch),
        install_requires=[torch_requirement(torch and check_torch(torch)), *DEPENDENCIES],
    )
