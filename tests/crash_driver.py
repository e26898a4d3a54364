"""Runs a job again and again and disturbs it at its k-th system call that changes files, for every k, until none is left.

The kernel asks this process before each such call of the job's (seccomp, user notification; Linux 5.5), whatever library makes
it and from whatever thread. So nothing in the job has to be patched, and the answer can be kill -9, an error, or Ctrl-C.

Only for a process without threads, since it forks: crash_jobs.py starts it.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import fcntl
import hashlib
import json
import os
import platform
import select
import shutil
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# {call: number on x86_64, on aarch64 and the other newer machines}, from the kernel's tables; None where there is no such call.
CALLS: dict[str, tuple[int | None, int | None]] = {
    "open": (2, None),
    "openat": (257, 56),
    "creat": (85, None),
    "write": (1, 64),
    "writev": (20, 66),
    "pwrite64": (18, 68),
    "pwritev": (296, 70),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "chown": (92, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rmdir": (84, None),
}
_FREEING = ("unlink", "unlinkat", "rmdir")
_NUMBERS = {pair[platform.machine() != "x86_64"]: name for name, pair in CALLS.items()}
_SECCOMP = {"x86_64": 317}.get(platform.machine(), 277)
_OPENING = {"open": 1, "openat": 2}  # which argument has the flags
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1  # linux/seccomp.h


def _filter() -> bytes:
    """A BPF program that asks before the calls above; of the opening ones, only those that create or truncate."""

    def op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    load, equal, bits, give = 0x20, 0x15, 0x45, 0x06
    ask, allow = op(give, 0x7FC00000), op(give, 0x7FFF0000)
    program = op(load, 0)
    for number, name in _NUMBERS.items():
        if number is None:
            continue
        if name in _OPENING:
            flags = op(load, 16 + 8 * _OPENING[name]) + op(bits, os.O_CREAT | os.O_TRUNC, 0, 1) + ask + allow
            program += op(equal, number, 0, 4) + flags
        else:
            program += op(equal, number, 0, 1) + ask
    return program + allow


def supported() -> bool:
    """Whether this system can do it."""
    actions = Path("/proc/sys/kernel/seccomp/actions_avail")
    return sys.platform == "linux" and sys.maxsize > 2**32 and actions.exists() and "user_notif" in actions.read_text()


def _install(channel: socket.socket) -> None:
    """Ask the other end of `channel` before every watched call from now on."""
    libc, program = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(_filter())
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", (len(program) - 1) // 8, ctypes.addressof(program)))
    no_new_privileges, set_mode_filter, new_listener = 38, 1, 8
    libc.prctl(no_new_privileges, 1, 0, 0, 0)
    listener = libc.syscall(_SECCOMP, set_mode_filter, new_listener, header)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    socket.send_fds(channel, [b"x"], [listener])
    os.close(listener)


_TOO_LONG = 30

Answer = Callable[[int, str], int]
"""(process that runs the job, call) -> 0 to let it go on, or the errno that it gets instead."""


def watched(run: Callable[[], Any], answer: Answer) -> tuple[str, str]:
    """Run a job in a child of its own; returns done, killed, error or crash, and the error's text.

    A crash is an error that is neither OSError, ValueError nor Ctrl-C, or half a minute without an end.
    """
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            faulthandler.dump_traceback_later(_TOO_LONG, exit=True, file=writing)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            _install(theirs)
            run()
            os._exit(0)
        except (OSError, ValueError, KeyboardInterrupt) as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
            os._exit(3)
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
            os._exit(4)
    theirs.close()
    os.close(writing)
    listener = socket.recv_fds(ours, 1, 1)[1][0]
    ours.close()
    ended = os.pidfd_open(child)
    while ended not in (ready := select.select([listener, ended], [], [])[0]):
        assert ready == [listener]
        notice = bytearray(80)
        try:
            fcntl.ioctl(listener, _RECEIVE, notice)
            number, _, _, call = struct.unpack_from("QIIi", notice)
            code = answer(child, _NUMBERS[call])
            fcntl.ioctl(listener, _SEND, struct.pack("QqiI", number, 0, -code, 0 if code else _CONTINUE))
        except FileNotFoundError:
            continue  # killed or interrupted meanwhile
    os.close(ended)
    os.close(listener)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    if os.WIFSIGNALED(status):
        return "killed", ""
    return {0: "done", 3: "error"}.get(os.WEXITSTATUS(status), "crash"), text


def snapshot(folder: Path) -> dict[str, str]:
    """{path: kind or hash} of all below a folder."""

    def what(path: Path) -> str:
        if path.is_symlink():
            return f"link to {os.readlink(path)}"
        return "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()

    return {path.relative_to(folder).as_posix(): what(path) for path in sorted(folder.rglob("*"))}


@dataclass(frozen=True)
class Job:
    """What is disturbed.

    prepare: makes the old state in an empty folder; what is only read may lie beside it. run: does the work in a copy of it.
    read: what a reader says of the result, in a word; raises ValueError or OSError if it refuses.
    """

    prepare: Callable[[Path], Any]
    run: Callable[[Path], Any]
    read: Callable[[Path], str] = lambda folder: ""


def sweep(job: Job, folder: Path, how: str, stride: int = 1) -> dict[str, Any]:
    """Disturb a job at its first call, then in steps of `stride` at later ones, until there is none left to disturb.

    how: kill, full (no space left on the device) or interrupt. Returns `old` and `new`, what there is (see `_found`) before
    and after an undisturbed run, and `outcomes`, each with `call` (where), `status` and `text` of `watched`, `left` (what there
    is then) and, after a kill, `again` (what there is after one more run, or its error).
    """
    start, work = folder / "start", folder / "work"
    start.mkdir()
    job.prepare(start)
    outcomes: list[dict[str, Any]] = []
    after: dict[str, Any] = {}
    while True:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(start, work, symlinks=True)
        if not outcomes:
            old = _found(job, work)
        target = Target(how, len(outcomes) * stride)
        status, text = watched(lambda: job.run(work), target.answer)
        left = _found(job, work)
        if not target.hit:
            assert status == "done", text
            return {"old": old, "new": left, "outcomes": outcomes}
        outcome = {"call": target.hit, "status": status, "text": text, "left": left}
        if how == "kill":
            key = json.dumps(left)
            if key not in after:
                again, text = watched(lambda: job.run(work), lambda process, call: 0)
                after[key] = _found(job, work) if again == "done" else {again: text}
            outcome["again"] = after[key]
        outcomes.append(outcome)


def _found(job: Job, folder: Path) -> dict[str, Any]:
    """`files`, a snapshot, and `read`, what a reader says or raises."""
    try:
        read = job.read(folder)
    except (OSError, ValueError) as error:
        read = f"{type(error).__name__}: {error}"
    return {"files": snapshot(folder), "read": read}


@dataclass
class Target:
    """Disturbs the `left`-th call from now; `hit` is then its name."""

    how: str
    left: int
    hit: str = ""

    def answer(self, process: int, call: str) -> int:
        if self.how == "full" and call in _FREEING:
            return 0
        self.left -= 1
        if self.left != -1:
            return 0
        self.hit = call
        if self.how != "full":
            os.kill(process, signal.SIGKILL if self.how == "kill" else signal.SIGINT)
        return errno.ENOSPC if self.how == "full" else 0
