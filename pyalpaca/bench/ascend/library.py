"""The emulation of csrc/emu with the kernels of csrc/ascend as a library, compiled once for each content with g++."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyalpaca

_PACKAGE = Path(pyalpaca.__file__).resolve().parent


def sources() -> Path:
    """The folder csrc: of the source tree, else the copy that an installed package carries. FileNotFoundError for neither."""
    for folder in (_PACKAGE.parent / "csrc", _PACKAGE / "_csrc"):
        if (folder / "emu").is_dir():
            return folder
    raise FileNotFoundError(
        f"no sources of the kernels in {_PACKAGE / '_csrc'}, expected those the package was built with; install pyalpaca again"
    )


def build_folder() -> Path:
    """Where what was compiled is kept: build/emu of a source tree, else the user's cache."""
    if sources() == _PACKAGE.parent / "csrc":
        return _PACKAGE.parent / "build/emu"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "pyalpaca/emu"


def compiler() -> list[str]:
    """The C++ compiler's command, $CXX or g++. FileNotFoundError where there is none."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(
            f"no C++ compiler `{command[0]}` found, needed to compile the emulation of an NPU; install g++, or name one in CXX"
        )
    return command


def compile_cached(source: Path, flags: Sequence[str], headers: Sequence[Path]) -> Path:
    """The object file of `source`, made if it was not made from the same bytes before."""
    key = hashlib.sha256(repr([str(source), *flags]).encode())
    for file in [source, *headers]:
        key.update(file.read_bytes())
    target = build_folder() / f"{source.stem}-{key.hexdigest()[:20]}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.o")
        command = ["nice", "-n", "5", *compiler(), *flags, "-c", str(source), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{source}: does not compile:\n{done.stderr[:4000]}")
        partial.rename(target)
    return target


def build_library(more: Sequence[Path], flags: Sequence[str] = (), headers: Sequence[Path] = ()) -> ctypes.CDLL:
    """A library of the emulation and the sources `more`; `headers` are further files that those depend on."""
    csrc = sources()
    emu = csrc / "emu"
    own = sorted([*emu.glob("include/**/*.h"), *emu.glob("src/*.h")])
    public = [file for file in own if "include" in file.parts]
    common = ["-std=c++17", "-O1", "-fPIC", "-w", f"-I{emu}/include", f"-I{csrc}"]
    with ThreadPoolExecutor(2) as pool:
        machine = [pool.submit(compile_cached, file, common, own) for file in sorted(emu.glob("src/*.cpp"))]
        kernels = [pool.submit(compile_cached, file, [*common, *flags], [*public, *headers]) for file in more]
        objects = [job.result() for job in [*machine, *kernels]]
    name = hashlib.sha256(repr(sorted(map(str, objects))).encode()).hexdigest()[:20]
    library = build_folder() / f"lib-{name}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}.so")
        subprocess.run([*compiler(), "-shared", *map(str, objects), "-o", str(partial)], check=True)
        partial.rename(library)
    loaded = ctypes.CDLL(str(library), mode=getattr(os, "RTLD_LOCAL", 0))
    for name in ("emu_tensor", "emu_reserve", "emu_unwritten", "emu_log"):
        getattr(loaded, name).restype = ctypes.c_uint64
    return loaded


def kernel_library(more: Sequence[Path] = (), flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The kernels, known by their names, their tilings, and those kernels in the files `more`."""
    kernels = sources() / "ascend"
    headers = [*sorted(kernels.glob("*/*.h")), *sorted(kernels.glob("kernels/*.cpp"))]
    return build_library([kernels / "emulated.cpp", *more], flags, headers)


def tiling(library: ctypes.CDLL, name: str, *arguments: int) -> tuple[int, ...]:
    """What the tiling function `name` says: cores first, 0 if it refuses the shape."""
    out = (ctypes.c_int64 * 16)()
    getattr(library, f"tiling_{name}")(*map(ctypes.c_int64, arguments), out)
    return tuple(out)
