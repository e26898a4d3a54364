"""Writing leaves the old result or the new one, never half of it, and one process writes at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from files_makers import WRITTEN, tree, write_file, write_new

from pyalpaca.files import atomic_file, atomic_folder


class BrokenError(Exception):
    pass


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    with atomic_file(path) as partial:
        partial.write_text("half")
        assert not path.exists()
    assert tree(tmp_path) == {"new/folder/a.txt": "half"}
    with atomic_file(path) as partial:
        assert partial.read_bytes() == b""
        partial.write_text("new")
        assert path.read_text() == "half"
    assert tree(tmp_path) == {"new/folder/a.txt": "new"}


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(BrokenError), atomic_file(path) as partial:
        partial.write_text("half")
        raise BrokenError
    assert tree(tmp_path) == {"a.txt": "old"}


def test_a_folder_appears_at_once(tmp_path: Path) -> None:
    for out in (tmp_path / "absent", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with atomic_folder(out) as partial:
            (partial / "deep").mkdir()
            (partial / "deep" / "a").write_text("1")
            assert not out.exists() or not list(out.iterdir())
        assert tree(out) == {"deep/a": "1"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["absent", "empty"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(BrokenError), atomic_folder(out) as partial:
        (partial / "a").write_text("half")
        raise BrokenError
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "a").write_text("old")
    with pytest.raises(BrokenError), atomic_folder(out) as partial:
        (partial / "a").write_text("half")
        raise BrokenError
    assert tree(tmp_path) == {"out/a": "old"}


def test_in_a_folder_with_files_of_its_own_only_those_of_the_same_name_change(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    for name in ("mine", "a", "deep/mine"):
        (out / name).write_text("old")
    with atomic_folder(out) as partial:
        (partial / "deep").mkdir()
        for name in ("a", "deep/b"):
            (partial / name).write_text("new")
    assert tree(tmp_path) == {"out/a": "new", "out/deep/b": "new", "out/deep/mine": "old", "out/mine": "old"}


def test_what_a_killed_writer_left_is_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "stale").write_text("x")
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
    assert tree(tmp_path) == {"out/a": "1"}


def test_a_file_is_no_place_for_a_folder_nor_a_folder_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(ValueError, match="out: is a file, expected a folder or nothing"), atomic_folder(tmp_path / "out"):
        pass
    assert tree(tmp_path) == {"out": "x"}
    with pytest.raises(ValueError, match="is a folder, expected a file or nothing"), atomic_file(tmp_path):
        pass
    assert tree(tmp_path) == {"out": "x"}


def test_new_files_have_the_usual_mode(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "out") as partial:
            (partial / "a").write_text("1")
        with atomic_file(tmp_path / "b") as partial:
            partial.write_text("1")
    finally:
        os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o7777 for path in (tmp_path / "out", tmp_path / "out" / "a", tmp_path / "b")}
    assert modes == {"out": 0o750, "a": 0o640, "b": 0o640}


def test_links_are_followed_and_stay(tmp_path: Path, old: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "file").symlink_to("out/mine")
    (tmp_path / "dangling").symlink_to("new/folder")
    write_new(tmp_path / "link")
    write_new(tmp_path / "dangling")
    with atomic_file(tmp_path / "file") as partial:
        partial.write_text("new")
    assert all((tmp_path / name).is_symlink() for name in ("link", "file", "dangling"))
    assert tree(old) == {**WRITTEN, "mine": "new"}
    assert tree(tmp_path / "new" / "folder") == {"config.json": "new", "deep/b": "new"}


def test_a_device_is_written_straight() -> None:
    with atomic_file("/dev/null") as path:
        assert path == Path("/dev/null")
    assert not Path("/dev/null").is_file()


def test_a_folder_that_may_not_be_written_is_said_before(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != old)
    with pytest.raises(PermissionError, match=r"Permission denied: .*out'$"), atomic_folder(old):
        pytest.fail("was begun")


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    for kind, write in (("atomic_file", write_file), ("atomic_folder", write_new)):
        path, partial = tmp_path / kind, tmp_path / f"{kind}.partial"
        with subprocess.Popen([sys.executable, "-c", OTHER, kind, path], stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "begun\n"
            with pytest.raises(ValueError, match=f"{kind}: another process is writing it; "):
                write(path)
            assert partial.exists()
            other.send_signal(signal.SIGTERM)
        assert partial.exists()
        write(path)  # the lock died with its process
        assert not partial.exists()


OTHER = """
import sys, time
import pyalpaca.files
with getattr(pyalpaca.files, sys.argv[1])(sys.argv[2]):
    print("begun", flush=True)
    time.sleep(60)
"""


def test_where_locks_are_unknown_the_first_writer_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with (
        pytest.raises(ValueError, match="out: another process has begun to write it"),
        atomic_folder(tmp_path / "out") as partial,
    ):
        (partial / "a").write_text("first")
        second = atomic_folder(tmp_path / "out")
        with second as again:
            (again / "a").write_text("second")
            assert not (again / "b").exists()
    assert tree(tmp_path) == {"out/a": "second"}
