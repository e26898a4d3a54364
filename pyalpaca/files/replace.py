"""A finished folder takes the place of another: in one step where the system can, file by file where it can't."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from pyalpaca.files.system import FULL, exchange, lock, sync

MARKERS = ("*.index.json", "params.json", "config.json", "adapter_config.json", "manifest.json", "latest*")
"""Files without which no reader takes a folder for a model, in the order in which they are to appear."""

_NO_LINKS = (errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


def contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """All files (links and the like too) and all folders below a folder, relative to it, a folder before what it holds."""
    found = sorted(folder.rglob("*"))
    files = [path.relative_to(folder) for path in found if path.is_symlink() or not path.is_dir()]
    return files, [path.relative_to(folder) for path in found if path.is_dir() and not path.is_symlink()]


def rename_whole(new: Path, final: Path, written: list[Path], held: list[int]) -> bool:
    """Let a flushed folder become `final` in one step, with all that `final` has and it lacks; `new` is then the old folder.

    written: the files of `new`. held: gets the descriptor that locks the old folder, so that no other run takes it for a
    leftover while it is removed. False if it can't be done: `final` is as it was, and `new` has at most got links.
    """
    try:
        if not final.exists():
            os.rename(new, final)
            return True
        if Path.cwd().is_relative_to(final):
            return False  # the user's shell would stay behind in the old folder
        held.append(os.open(final, os.O_RDONLY))
        if not lock(held[-1]):
            return False
        empty = not any(final.iterdir())
        _keep(final, new)
        if empty:
            os.rename(new, final)
        else:
            exchange(new, final)
    except OSError as error:
        if error.errno in FULL:  # one by one could fail for the same reason, half-way
            raise
        return False
    if not empty:
        _keep_late(new, final, set(written))
        sync(final)
    return True


def _keep(old: Path, new: Path) -> None:
    """Link into `new` what `old` has and `new` lacks, and give it the mode and owner of `old`; OSError where that can't be."""
    if not os.access(old, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(old))
    changed = any(new.iterdir())
    with os.scandir(old) as entries:
        for entry in entries:
            target = new / entry.name
            if entry.is_dir(follow_symlinks=False):
                target.mkdir(exist_ok=True)
                _keep(Path(entry.path), target)
            elif not os.path.lexists(target):
                _link(entry.path, target)
            elif target.is_dir():  # the old one may be a link to a folder, which has to be followed
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), entry.path)
    status = old.stat()
    os.chown(new, status.st_uid, status.st_gid)
    shutil.copystat(old, new)
    if changed:
        os.utime(new)
    sync(new)


def _link(source: str, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(source, target, follow_symlinks=False)
        if not target.is_symlink():
            sync(target)


def _keep_late(old: Path, new: Path, written: set[Path]) -> None:
    """Move to `new` what others have put into `old` after it was read, and the originals of what could only be copied."""
    for name in contents(old)[0]:
        target = new / name
        if name in written or (os.path.lexists(target) and os.path.samestat((old / name).lstat(), target.lstat())):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(old / name, target)


def rename_one_by_one(new: Path, final: Path, files: list[Path], folders: list[Path]) -> None:
    """Rename each file into its place: the old markers away, the others in, the new markers last; an error takes all back."""
    away = Path(tempfile.mkdtemp(dir=new))
    made: list[Path] = []
    renamed: list[tuple[Path, Path]] = []

    def rename(source: Path, target: Path) -> None:
        renamed.append((source, target))
        os.rename(source, target)

    def put_away(name: Path) -> None:
        if os.path.lexists(final / name):
            rename(final / name, away / str(len(renamed)))

    def put(name: Path) -> None:
        put_away(name)
        rename(new / name, final / name)

    rank = {name: next((i for i, marker in enumerate(MARKERS) if fnmatch(name.name, marker)), -1) for name in files}
    markers = sorted((name for name in files if rank[name] >= 0), key=rank.__getitem__)
    others = [name for name in files if rank[name] < 0]
    try:
        for name in folders:
            if not (final / name).is_dir():
                made.append(final / name)
                (final / name).mkdir()
        for name in files:
            if (final / name).is_dir() and not (final / name).is_symlink():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(final / name))
        for step, chosen in ((put_away, markers[::-1]), (put, others), (put, markers)):
            for name in chosen:
                step(name)
            for folder in (*folders, Path()):
                sync(final / folder)
    except BaseException:
        for source, target in reversed(renamed):
            with suppress(FileNotFoundError):  # the last one may not have been done
                os.rename(target, source)
        for folder in reversed(made):
            with suppress(FileNotFoundError):
                folder.rmdir()
        raise
