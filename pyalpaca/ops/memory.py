"""Memory that is used again: torch's large tensors on the CPU out of a pool of pages that the process has touched before."""

from __future__ import annotations

import os

from pyalpaca.ops import extension


def reuse_memory(on: bool = True) -> bool:
    """Let all tensors on the CPU of 1 MiB or more come from pyalpaca's pool from here on, or from torch's allocator again.

    A page of fresh memory costs a fault and a fill with zeros at its first write, often more than the work on it; torch gives
    large tensors back to the system each time. The pool keeps as much as the process has needed at once at most, so the peak
    stays what it is, but what one step has let go is not given back before the process ends.
    For commands, before they make tensors and other threads. PYALPACA_REUSE_MEMORY=0 forbids it. Returns whether it is on.
    """
    on = on and os.environ.get("PYALPACA_REUSE_MEMORY", "1") != "0" and extension.problem() is None
    if extension.problem() is None:
        extension.module().reuse_memory(on)
    return on


def release_memory() -> None:
    """Give what the pool holds for later back to the system: the next tensors are of fresh pages, as in a new process."""
    if extension.problem() is None:
        extension.module().release_memory()


def idle_memory() -> int:
    """Bytes that the pool holds for later."""
    return int(extension.module().idle_memory()) if extension.problem() is None else 0
