"""What a benchmark of files needs of the disk: room, a page cache in a known state, and `cp` as the peer."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from pyalpaca.files import free_space, human_size, sync

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_CHUNK = 8 << 20


def files_under(paths: Iterable[Path]) -> list[Path]:
    """Every file in the given files and folders."""
    found = [[path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) for path in paths]
    return [file for files in found for file in files]


def total_size(paths: Iterable[Path]) -> int:
    """Bytes of every file in the given files and folders."""
    return sum(file.stat().st_size for file in files_under(paths))


def require_space(folder: Path, needed: int) -> None:
    """ValueError if the disk of `folder`, which need not exist yet, has less than `needed` bytes free."""
    free = free_space(folder)
    if free < needed:
        raise ValueError(
            f"{folder}: the benchmark needs {human_size(needed)}, {human_size(free)} are free there; "
            f"choose a smaller --scale or another --work-dir"
        )


def filesystem(path: Path) -> str:
    """The kind of filesystem that a path lies on, `ext4`; `unknown` where there is no /proc."""
    device = path.stat().st_dev
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    kinds = {line.split()[2]: line.split(" - ")[1].split()[0] for line in lines}
    return kinds.get(f"{os.major(device)}:{os.minor(device)}", "unknown")


def remove(*folders: Path) -> None:
    """Remove folders and wait until the disk has nothing left to write, so that the next timing begins with an idle one."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def touch_memory(folder: Path, most: int) -> int:
    """Have the free memory used once as page cache, up to `most` bytes; how many bytes that were.

    A virtual machine may hand free memory back to its host within seconds (free page reporting), and then waits for the host
    at the first touch: whoever is timed after a pause would pay. Reading the hole of a sparse file touches memory without
    the disk, and without taking any from others.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemFree:"))
    count = min(free * 9 // 10, most)  # all of it would evict what is in the page cache
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(count)
        _read_through(file.fileno())
    return count


def warm(paths: Sequence[Path]) -> None:
    """Read every file once, so that as much of them as memory allows is in the page cache."""
    for file in files_under(paths):
        with open(file, "rb", buffering=0) as stream:
            _read_through(stream.fileno())


def _read_through(descriptor: int) -> None:
    buffer = bytearray(_CHUNK)
    while os.readv(descriptor, [buffer]):
        pass


def cool(paths: Sequence[Path]) -> None:
    """Drop the files from the page cache: all of the cache where we may, else what of these files no other process maps."""
    os.sync()
    try:
        DROP_CACHES.write_text("3\n", encoding="ascii")
    except OSError:
        for file in files_under(paths):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def cached_share(paths: Sequence[Path]) -> float | None:
    """The share of the files' pages that is in the page cache, by mincore(2); None on a system without it."""
    mincore = getattr(ctypes.CDLL(None), "mincore", None)
    if mincore is None:
        return None
    pages = present = 0
    for file in files_under(paths):
        size = file.stat().st_size
        if size == 0:
            continue
        count = -(-size // mmap.PAGESIZE)
        vector = ctypes.create_string_buffer(count)
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY) as view:
            # The mapping's address, which Python only gives of a writable buffer: hence ACCESS_COPY. Nothing is touched.
            start = ctypes.c_char.from_buffer(view)
            failed = mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), vector)
            del start
        if failed:
            return None
        pages, present = pages + count, present + count - vector.raw.count(b"\0")
    return present / pages if pages else None


def copy(source: Path, target: Path) -> tuple[float, float]:
    """`cp -r` of a folder: (seconds until cp ended, seconds until the copy was on the disk, each file flushed).

    Bytes are really copied, also on filesystems that could share the blocks of the original.
    """
    began = time.perf_counter()
    subprocess.run(["cp", "-r", *_no_sharing(), str(source), str(target)], check=True)
    copied = time.perf_counter()
    for path in (*files_under([target]), target):
        sync(path)
    return copied - began, time.perf_counter() - began


def _no_sharing() -> list[str]:
    """The flag against reflinks, where cp knows it (GNU)."""
    version = subprocess.run(["cp", "--version"], capture_output=True, text=True, check=False).stdout
    return ["--reflink=never"] if "GNU" in version else []
