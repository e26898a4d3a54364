"""What the operating system is asked for directly: flush, lock, exchange, allocate."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write fails with where no more may be written."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems can't flush folders
            raise
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Lock what is open, until it is closed; False if another has locked it. Where the file system has no locks, always True."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def names(path: Path, descriptor: int) -> bool:
    """Whether `path` (not followed if it is a link) still names what was opened."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def exchange(a: Path, b: Path) -> None:
    """Let two paths change places in one step; OSError where the system or the file system can't (renameat2, Linux)."""
    code = _call("renameat2", _AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if code:
        raise OSError(code, os.strerror(code), str(a), None, str(b))


def preallocate(descriptor: int, size: int) -> None:
    """Give an empty file its size in bytes and, where the file system can, its space: OSError now if the disk is too small.

    Linux's own call: posix_fallocate writes into every block of a file system that can't, which takes as long as the writing.
    """
    code = errno.EINTR if size > 0 else errno.EINVAL
    while code == errno.EINTR:
        code = _call("fallocate", descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size))
    if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        os.ftruncate(descriptor, size)
    elif code:
        raise OSError(code, os.strerror(code))


def _call(function: str, *arguments: object) -> int:
    """Call a function of Linux's C library; 0 or its errno."""
    if sys.platform != "linux":
        return errno.ENOSYS
    try:
        called = getattr(ctypes.CDLL(None, use_errno=True), function)
    except AttributeError:
        return errno.ENOSYS  # an older library
    return ctypes.get_errno() if called(*arguments) else 0
