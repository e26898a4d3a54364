"""Files are in the page cache or not, room on the disk is asked for first, and cp is flushed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyalpaca.bench import disk

MB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of random bytes, flushed: a page that waits for the disk can't be dropped."""
    (tmp_path / "source" / "below").mkdir(parents=True)
    for name in ("a", "below/b"):
        with open(tmp_path / "source" / name, "wb") as file:
            file.write(os.urandom(4 * MB + 1))
            os.fsync(file.fileno())
    return tmp_path / "source"


def test_files_are_found_below_folders_and_as_such(folder: Path) -> None:
    assert disk.files_under([folder]) == [folder / "a", folder / "below" / "b"]
    assert disk.total_size([folder, folder / "a"]) == 3 * (4 * MB + 1)


def test_a_file_is_in_the_cache_after_warming_and_not_after_cooling(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if disk.filesystem(folder) in ("tmpfs", "ramfs"):
        pytest.skip("a filesystem in memory has no page cache apart from itself")
    # Only these files are dropped, as for a user who may not drop all caches.
    monkeypatch.setattr(disk, "DROP_CACHES", folder / "not there" / "drop_caches")
    disk.warm([folder])
    assert disk.cached_share([folder]) == 1.0
    disk.cool([folder])
    share = disk.cached_share([folder])
    assert share is not None and share < 0.1
    disk.warm([folder / "a"])
    share = disk.cached_share([folder])
    assert share is not None and 0.4 < share < 0.6


def test_all_caches_are_dropped_where_that_is_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "DROP_CACHES", folder.parent / "drop_caches")
    disk.cool([folder])
    assert (folder.parent / "drop_caches").read_text() == "3\n"


def test_an_empty_file_has_no_share(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert disk.cached_share([tmp_path]) is None


def test_memory_is_touched_up_to_a_limit_and_nothing_stays(tmp_path: Path) -> None:
    if not Path("/proc/meminfo").exists():
        pytest.skip("there is no /proc")
    assert disk.touch_memory(tmp_path, 3 * MB) == 3 * MB
    assert list(tmp_path.iterdir()) == []


def test_cp_copies_every_byte_and_flushing_takes_longer(folder: Path) -> None:
    target = folder.parent / "copy"
    plain, flushed = disk.copy(folder, target)
    assert 0 < plain < flushed
    assert [f.read_bytes() for f in disk.files_under([target])] == [f.read_bytes() for f in disk.files_under([folder])]
    disk.remove(target, folder.parent / "never there")
    assert not target.exists() and folder.exists()


def test_room_on_the_disk(tmp_path: Path) -> None:
    disk.require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(
        ValueError, match=r"there: the benchmark needs 1,000,000,000.00 GB, \d+\.\d\d GB are free there; choose a"
    ):
        disk.require_space(tmp_path / "not" / "there", 10**18)
