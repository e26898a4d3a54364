"""A folder takes the place of another in one step, or file by file in an order that no reader is misled by."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from files_makers import WRITTEN, inode, refuse_exchange, tree, write_file, write_new

from pyalpaca.files import atomic_folder, replace, sync


def test_a_folder_is_replaced_at_once_and_what_stays_is_the_same_file(old: Path) -> None:
    before, mine, wide = inode(old), inode(old / "deep" / "er" / "mine"), os.open(old / "mine", os.O_WRONLY | os.O_APPEND)
    old.chmod(0o750)
    write_new(old)
    assert tree(old) == WRITTEN
    assert inode(old) != before
    assert inode(old / "deep" / "er" / "mine") == mine
    assert old.stat().st_mode & 0o7777 == 0o750
    os.write(wide, b" and more")  # whoever has a file open goes on writing into it
    os.close(wide)
    assert (old / "mine").read_text() == "old and more"
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_what_others_add_while_the_folder_is_replaced_is_kept(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = replace.exchange

    def late(a: Path, b: Path) -> None:
        (b / "deep" / "late").write_text("late")
        (b / "edited").write_text("late")
        os.replace(b / "edited", b / "mine")
        exchange(a, b)

    monkeypatch.setattr(replace, "exchange", late)
    write_new(old)
    assert tree(old) == {**WRITTEN, "deep/late": "late", "mine": "late"}


def test_where_links_cant_be_made_files_are_copied_until_the_folder_is_there(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    before, mine = inode(old), inode(old / "mine")
    monkeypatch.setattr(os, "link", refuse)
    disk = Disk(monkeypatch)
    for name in tree(old):
        sync(old / name)
    write_new(old)
    assert disk.checks
    assert tree(old) == WRITTEN
    assert inode(old) != before
    assert inode(old / "mine") == mine


def stand_below(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    """Exchanged, the shell of the user would be in a folder that is gone."""
    monkeypatch.chdir(out / "deep")


def keep_no_owner(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)


def forbid_the_parent(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != out.parent and access(path, mode))


def forbid_a_folder_inside(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != out / "deep" / "er" and access(path, mode))


def link_a_folder_inside(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    (out / "deep").rename(out.parent / "elsewhere")
    (out / "deep").symlink_to(out.parent / "elsewhere")


OBSTACLES = (refuse_exchange, stand_below, keep_no_owner, forbid_the_parent, forbid_a_folder_inside, link_a_folder_inside)


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_where_a_folder_cant_be_exchanged_files_are_renamed(
    obstacle: Callable[[pytest.MonkeyPatch, Path], None], old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstacle(monkeypatch, old)
    before, others = inode(old), {path.name for path in old.parent.iterdir()}
    write_new(old)
    assert {name: (old / name).read_text() for name in WRITTEN} == WRITTEN
    assert inode(old) == before
    assert {path.name for path in old.parent.iterdir()} == others
    assert sorted(path.name for path in old.iterdir()) == ["config.json", "deep", "mine"]


def test_a_folder_that_another_process_has_locked_is_not_exchanged(old: Path) -> None:
    before, other = inode(old), os.open(old, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    write_new(old)
    os.close(other)
    assert inode(old) == before
    assert tree(old) == WRITTEN


def test_files_renamed_one_by_one_are_taken_back_after_an_error(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_exchange(monkeypatch, old)
    before = tree(old)
    (old / "deep" / "b").mkdir()  # which a file can't replace
    with pytest.raises(IsADirectoryError, match="out/deep/b"):
        write_new(old)
    (old / "deep" / "b").rmdir()
    rename, count = os.rename, 0

    def break_off(a: Path, b: Path) -> None:
        nonlocal count
        count += b.is_relative_to(old)
        if count == 2:
            count += 1
            raise OSError(errno.EIO, "Input/output error", str(a), None, str(b))
        rename(a, b)

    monkeypatch.setattr(os, "rename", break_off)
    with pytest.raises(OSError, match=r"Input/output error: '[^']*/out/[^']*'$"):
        write_new(old)
    assert count > 2
    assert tree(old.parent) == {f"out/{name}": text for name, text in before.items()}


class Disk:
    """What is on the disk for sure: the content of files and folders when they were last flushed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flushed: dict[int, object] = {}
        self.checks = 0
        fsync, rename, replace_, exchange = os.fsync, os.rename, os.replace, replace.exchange

        def flush(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self.flushed[inode(path)] = self.content(path)

        def checked(move: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
            def wrapper(a: Path, b: Path) -> None:
                if a.exists():
                    self.check(a)
                move(a, b)

            return wrapper

        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(os, "rename", checked(rename))
        monkeypatch.setattr(os, "replace", checked(replace_))
        monkeypatch.setattr(replace, "exchange", checked(exchange))

    def content(self, path: Path) -> object:
        return {p.name: inode(p) for p in path.iterdir()} if path.is_dir() else path.read_bytes()

    def check(self, path: Path) -> None:
        """All below a path is on the disk as it is."""
        for found in (path, *path.rglob("*")):
            self.checks += 1
            assert self.flushed.get(inode(found)) == self.content(found), found


def test_all_is_flushed_before_it_is_renamed_and_the_renaming_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    write_file(tmp_path / "new" / "er" / "file")
    disk.check(tmp_path / "new")
    for out in (tmp_path / "absent" / "out", tmp_path / "empty", tmp_path / "old", tmp_path / "old"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        write_new(out)
        disk.check(out)
        assert disk.flushed[inode(out.parent)].items() >= {out.name: inode(out)}.items()
        (out / "deep" / "mine").write_text("mine")
        for path in (out / "deep" / "mine", out / "deep"):
            sync(path)
    refuse_exchange(monkeypatch, out)
    write_new(out)
    assert all(disk.flushed[inode(folder)] == disk.content(folder) for folder in (out, out / "deep"))
    assert disk.checks > 30


def test_old_markers_are_gone_from_the_disk_before_a_weight_changes_and_new_ones_come_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, events = tmp_path / "out", []
    names = ("a.json", "config.json", "latest", "model.safetensors", "model.safetensors.index.json", "release/weights.pt")

    def write(text: str) -> None:
        with atomic_folder(out) as partial:
            (partial / "release").mkdir()
            for name in names:
                (partial / name).write_text(text)

    write("old")
    rename, fsync = os.rename, os.fsync

    def moved(a: Path, b: Path) -> None:
        if a.exists():
            events.append(f"-{a.name}" if a.is_relative_to(out) else f"+{b.name}")
        rename(a, b)

    def flushed(descriptor: int) -> None:
        if inode(out) == os.fstat(descriptor).st_ino:
            events.append("|")
        fsync(descriptor)

    refuse_exchange(monkeypatch, out)
    monkeypatch.setattr(os, "rename", moved)
    monkeypatch.setattr(os, "fsync", flushed)
    write("new")
    assert " ".join(events) == (
        "-latest -config.json -model.safetensors.index.json | "
        "-a.json +a.json -model.safetensors +model.safetensors -weights.pt +weights.pt | "
        "+model.safetensors.index.json +config.json +latest |"
    )
    assert tree(out) == dict.fromkeys(names, "new")
