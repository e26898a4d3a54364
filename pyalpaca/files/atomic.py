"""A file or a folder appears whole or not at all: it is written under another name, flushed, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyalpaca.files.replace import contents, rename_one_by_one, rename_whole
from pyalpaca.files.system import FULL, lock, names, sync

PARTIAL = ".partial"
"""The ending of what is still being written."""


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary sibling, to be written in place; on success it takes the name `path`, on failure it is removed.

    A link is followed and stays; a device or a pipe is yielded itself. What a killed run left is removed. ValueError if `path`
    is a folder or another process is writing it. An OSError names `path`.
    """
    final = Path(os.path.realpath(path))
    if final.is_dir():
        raise ValueError(f"{path}: is a folder, expected a file or nothing; choose another output file")
    if final.exists() and not final.is_file():
        yield final
        return
    partial = final.with_name(final.name + PARTIAL)
    with _writing(path, partial, folder=False) as held:
        yield partial
        _check_held(path, partial, held)
        sync(partial)
        os.replace(partial, final)
        sync(final.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; on success its content appears under `path`, on failure it is removed.

    Of a folder that exists, the files that are not written anew stay, those in sub-folders too. Whenever the process or the
    machine stops, `path` is what it was or what it was to become: the new folder takes the name of one that is absent or empty;
    for any other, the files that stay are linked (where links can't be made: copied) into the new one, and the two change
    places in one step.

    Where they can't (not Linux; a file system without that, such as NFS; a mount point; the working directory or one above it;
    an owner that can't be kept; a link to a folder among what is replaced), files are renamed one by one: the old MARKERS away,
    all others in, the new MARKERS last. An error on the way takes all of it back. Only a run that is killed just then leaves a
    mixture; it has no markers, so that no reader takes it for a model, and the next run replaces it.

    A link is followed and stays. What a killed run left is removed. ValueError if `path` is a file, or if another process is
    writing it (where the file system has no locks, whoever began first hears of it at its end). An OSError names the file.
    """
    final = Path(os.path.realpath(path))
    if final.exists() and not final.is_dir():
        raise ValueError(f"{path}: is a file, expected a folder or nothing; choose another output folder")
    if final.is_dir() and not os.access(final, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    beside = _can_rename(final.parent, final)
    partial = final.with_name(final.name + PARTIAL) if beside else final / PARTIAL
    with _writing(path, partial, folder=True) as held:
        yield partial
        _check_held(path, partial, held)
        files, folders = contents(partial)
        for name in (*files, *reversed(folders), Path()):
            if not (partial / name).is_symlink():
                sync(partial / name)
        if not (beside and rename_whole(partial, final, files, held)):
            rename_one_by_one(partial, final, files, folders)
        sync(final.parent)


@contextmanager
def _writing(path: str | Path, partial: Path, folder: bool) -> Iterator[list[int]]:
    """Make `partial`, empty and locked, and remove at the end what then has this name: what was written, or the old result.

    Yields the descriptors that hold the locks; who puts something of its own under that name adds its lock. An OSError names
    the path that the user knows, also where the system names none.
    """
    made: list[Path] = []
    held: list[int] = []
    try:
        _make_folders(partial.parent, made)
        held.append(_claim(path, partial, folder))
        yield held
    except OSError as error:
        if (name := _known_name(error, path, partial)) is not None:
            raise OSError(error.errno, error.strerror, name) from error
        raise
    finally:
        _clean(path, partial, held, made)


def _known_name(error: OSError, path: str | Path, partial: Path) -> str | None:
    """What a user calls the temporary file that an error names, or the unnamed one for which no space was left."""
    if error.filename is None:
        return str(path) if error.errno in FULL else None
    for name in (error.filename, error.filename2):
        if isinstance(name, str | bytes) and (file := Path(os.fsdecode(name))).is_relative_to(partial):
            return str(Path(path) / file.relative_to(partial))
    return None


def _clean(path: str | Path, partial: Path, held: list[int], made: list[Path]) -> None:
    """Remove what is under the temporary name if it is ours, and the parents that were made for nothing; Ctrl-C has to wait."""
    try:
        with suppress(OSError, ValueError):
            if not held and (descriptor := _seize(path, partial)) is not None:
                held.append(descriptor)  # interrupted just after it was made
            if any(names(partial, descriptor) for descriptor in held):
                _remove(partial)
        for parent in reversed(made):
            with suppress(OSError):  # it holds what was written
                parent.rmdir()
    except KeyboardInterrupt:
        _clean(path, partial, held, made)
        raise
    while held:
        os.close(held.pop())


def _make_folders(folder: Path, made: list[Path]) -> None:
    """mkdir -p that lasts; adds to `made` what was not there."""
    if folder.is_dir():
        return
    _make_folders(folder.parent, made)
    made.append(folder)
    with suppress(FileExistsError):
        folder.mkdir()
    sync(folder.parent)


def _claim(path: str | Path, partial: Path, folder: bool) -> int:
    """Make `partial` anew and lock it for as long as the descriptor that is returned is open; ValueError if it is locked.

    A lock dies with its process, so what is there without one was left by a process that was killed.
    """
    while True:
        try:
            partial.mkdir() if folder else partial.touch(exist_ok=False)
            made = True
        except FileExistsError:
            made = False
        descriptor = _seize(path, partial)
        if descriptor is not None and made:
            return descriptor
        if descriptor is not None:
            try:
                _remove(partial)
            finally:
                os.close(descriptor)


def _seize(path: str | Path, partial: Path) -> int | None:
    """Open and lock what is there; None if it has just gone. ValueError if another process has it."""
    try:  # NFS locks a file only for who may write it
        descriptor = os.open(partial, os.O_NOFOLLOW | (os.O_RDONLY if partial.is_dir() else os.O_RDWR))
    except FileNotFoundError:
        return None
    try:
        if not lock(descriptor):
            raise ValueError(f"{path}: another process is writing it; wait until it has ended or choose another output")
        if names(partial, descriptor):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _check_held(path: str | Path, partial: Path, held: list[int]) -> None:
    """ValueError if another process, which could not see our lock, has taken over, or the writer put another file here."""
    if not names(partial, held[0]):
        raise ValueError(f"{path}: another process has begun to write it meanwhile; let one of them end before the other begins")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _can_rename(source: Path, target: Path) -> bool:
    """Whether what lies in one folder may be renamed into another, if that is there: not so for a mount point."""
    if not target.is_dir():
        return True
    if os.path.ismount(target) or not os.access(source, os.W_OK | os.X_OK):
        return False
    nothing = f"{PARTIAL}-{os.getpid()}"
    try:
        os.rename(source / nothing, target / nothing)
    except OSError as error:
        return error.errno != errno.EXDEV  # Linux sees that before it looks for the name, for a bind mount too
    return True
