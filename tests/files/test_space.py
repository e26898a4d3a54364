"""Too little room is said at the start or leaves the old result, on a real disk; a mount point is written from within."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from files_makers import tree, write_new

from pyalpaca.files import atomic_file, atomic_folder, free_space, human_size, preallocate, require_space, system


def allocate(out: Path, size: int) -> None:
    with atomic_folder(out) as partial, (partial / "a").open("wb") as file:
        preallocate(file.fileno(), size)


def test_a_limit_of_the_file_size_is_named_with_the_path(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "file").write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/file'$"), atomic_file(tmp_path / "file") as partial:
            partial.write_bytes(bytes(2000))
        with pytest.raises(OSError, match=r"File too large: '.*/out'$"):
            allocate(tmp_path / "out", 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(tmp_path) == {"file": "old"}


def mount(*arguments: object) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no mounting here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, 64 kB large."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", path)
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_leaves_the_old_result(disk: Path) -> None:
    out = disk / "out"

    def write(size: int, text: bytes) -> None:
        with atomic_folder(out) as partial:
            for name in "abc":
                (partial / name).write_bytes(text * size)

    write(4096, b"1")
    before = tree(disk)
    for size in range(20480, 40960, 4096):
        with pytest.raises(OSError, match=r"No space left on device: '.*/out'"):
            write(size, b"2")
        assert tree(disk) == before
    write(4096, b"2")
    assert tree(disk) == {f"out/{name}": "2" * 4096 for name in "abc"}


def test_a_full_disk_is_found_at_the_start(disk: Path) -> None:
    require_space(disk / "new" / "out", 60_000)
    with pytest.raises(ValueError, match=r"new/out: 1.00 MB are to be written, but 65.54 kB are free there; free 934.46 kB"):
        require_space(disk / "new" / "out", 1_000_000)
    with pytest.raises(OSError, match=r"No space left on device: '.*/out'"):
        allocate(disk / "out", 70_000)
    allocate(disk / "out", 40_000)
    assert free_space(disk) < 30_000
    assert (disk / "out" / "a").read_bytes() == bytes(40_000)


def test_a_mount_point_is_written_from_within(disk: Path, tmp_path: Path) -> None:
    (disk / "mine").write_text("old")
    with atomic_folder(disk) as partial:
        assert partial == disk / ".partial"
        (partial / "a").write_text("1")
    assert tree(disk) == {"mine": "old", "a": "1"}
    bound = tmp_path / "bound"
    bound.mkdir()
    (tmp_path / "source").mkdir()
    mount("--bind", tmp_path / "source", bound)  # the same file system, but not renamed across
    try:
        write_new(bound)
    finally:
        subprocess.run(["umount", bound], check=True)
    assert tree(tmp_path / "source") == {"config.json": "new", "deep/b": "new"}
    assert sorted(path.name for path in (tmp_path / "source").iterdir()) == ["config.json", "deep"]


def test_space_is_given_where_the_file_system_can_and_the_size_anyway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "a").open("wb") as file:
        preallocate(file.fileno(), 0)
        assert os.fstat(file.fileno()).st_size == 0
        preallocate(file.fileno(), 100_000)
        assert os.fstat(file.fileno()).st_size == 100_000
    monkeypatch.setattr(system, "_call", lambda *_: errno.EOPNOTSUPP)
    with (tmp_path / "b").open("wb") as file:
        preallocate(file.fileno(), 100_000)
        assert os.fstat(file.fileno()).st_size == 100_000


def test_sizes_are_written_for_people() -> None:
    sizes = {0: "0 bytes", 999: "999 bytes", 1000: "1.00 kB", 13_476_838_400: "13.48 GB", 2 * 10**12: "2,000.00 GB"}
    assert {size: human_size(size) for size in sizes} == sizes
