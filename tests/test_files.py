"""Writing leaves the old result or the new one, never half of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyalpaca.files import atomic_file, atomic_folder


class BrokenError(Exception):
    pass


def tree(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


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


def test_a_file_is_no_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(ValueError, match="out: is a file, expected a folder or nothing"), atomic_folder(tmp_path / "out"):
        pass
    assert tree(tmp_path) == {"out": "x"}
