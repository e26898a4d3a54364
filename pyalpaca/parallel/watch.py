"""Which rank was lost, and where: each process gives signs of life to the launcher's store, and reads the others' when one fails.

A collective that fails says nothing of who is to blame: the connection of a neighbour that has given up is closed, too. So a
thread of each process writes down, twice a second, at which step it is and what its main thread is doing.
"""

from __future__ import annotations

import json
import linecache
import os
import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from pyalpaca.parallel.host import launcher_store, tell

_PACKAGE = Path(__file__).parents[1]
_FAILED = re.compile(r"gloo|nccl|hccl|timed out|connection (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE)
_INTERVAL = 0.5
_ROUNDS = 3
HANGS = 3
"""Exit status of a process that hangs."""

Sign = dict[str, Any]


class PeerLostError(ConnectionError):
    """A collective failed because another rank has died, hangs or has stopped."""


class Watch:
    """Turns the failure of a collective within its context into a PeerLostError that names the lost rank, its step and place.

    Every process must make it; group: see host_group; step: the first. Does nothing where there is one process.
    told_to_end: to be set when a signal asks for an end. A process whose main thread does not come to it, while all others
    have ended by errors, then ends at once: it would keep torchrun from starting them again for half a minute.
    """

    def __init__(self, group: dist.ProcessGroup | None, step: int) -> None:
        self._step, self.told_to_end = step, False
        self._rank, self._world = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        self._store = launcher_store() if group is not None else None
        self._main = threading.get_ident()
        self._beat, self._over, self._stopped = 0, "", threading.Event()
        self._place: tuple[str, bool] | None = None
        self._thread: threading.Thread | None = None
        if self._store is not None:
            self._prefix = tell(uuid.uuid4().hex, group)[0]
            self._say()
            tell(None, group)  # from here on everybody's sign is there

    def __enter__(self) -> Watch:
        if self._store is not None:
            self._thread = threading.Thread(target=self._keep_saying, name="signs of life", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if self._store is not None and error is not None and at is not None:
                self._end(error, at)
        finally:
            self._stopped.set()
            if self._thread is not None:
                self._thread.join()

    def begin_step(self, step: int) -> None:
        """Let the others know which step is running."""
        self._step = step
        if self._store is not None:
            self._say_if_possible()

    def _end(self, error: BaseException, at: TracebackType) -> None:
        if isinstance(error, PeerLostError) or not is_lost_connection(error):
            self._over = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self._say_if_possible()
            return
        self._place = (place(reversed(traceback.extract_tb(at)))[0], True)
        reason = self._who(timed_out=bool(re.search("tim(ed|eout)", str(error), re.IGNORECASE)))
        sentence = f"step {self._step}: rank {self._rank} failed in {self._place[0]}: {reason}"
        self._over = reason if reason.startswith("because") else f"because {reason}"
        self._say_if_possible()
        raise PeerLostError(f"{sentence}; go on with --resume") from error

    def _who(self, timed_out: bool) -> str:
        """Who is to blame, as far as the signs of life say it."""
        try:
            before = self._read()
            for _ in range(_ROUNDS):
                time.sleep(4 * _INTERVAL)
                now = self._read()
                others = [r for r in range(self._world) if r != self._rank]
                silent = [r for r in others if not now[r]["over"] and now[r]["beat"] == before[r]["beat"]]
                if len(silent) < 2:
                    break
        except (RuntimeError, ValueError):  # the store is gone, and with it who held it
            return "rank 0, or the launcher, has died"
        stopped = [r for r in others if now[r]["over"] and not now[r]["over"].startswith("because ")]
        late = [r for r in others if not now[r]["over"] and r not in silent and not now[r]["waits"]]
        hearsay = [now[r]["over"].removeprefix("because ") for r in others if now[r]["over"].startswith("because ")]
        if stopped:
            return "; ".join(f"rank {r} stopped at step {now[r]['step']} ({now[r]['over']})" for r in stopped)
        if silent:
            word = "gives no sign of life any more" if timed_out else "has died"
            return "; ".join(f"rank {r} {word}, last seen at step {now[r]['step']} in {now[r]['place']}" for r in silent)
        if timed_out and late:
            return "; ".join(f"rank {r} hangs at step {now[r]['step']} in {now[r]['place']}" for r in late)
        if hearsay:
            return hearsay[0]
        return "; ".join(f"rank {r} is at step {now[r]['step']} in {now[r]['place']}" for r in others)

    def _read(self) -> list[Sign]:
        assert self._store is not None
        return [json.loads(data) for data in self._store.multi_get([self._key(rank) for rank in range(self._world)])]

    def _key(self, rank: int) -> str:
        return f"pyalpaca/signs/{self._prefix}/{rank}"

    def _say(self) -> None:
        assert self._store is not None
        self._beat += 1
        where = self._place
        if where is None and (frame := sys._current_frames().get(self._main)) is not None:
            where = place(traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False))
        words, waits = where or ("nothing", False)
        sign = {"beat": self._beat, "step": self._step, "place": words, "waits": waits, "over": self._over}
        self._store.set(self._key(self._rank), json.dumps(sign))

    def _say_if_possible(self) -> None:
        with suppress(RuntimeError):  # whoever held the store has ended; the others will notice that
            self._say()

    def _keep_saying(self) -> None:
        left_alone = 0
        while not self._stopped.wait(_INTERVAL):
            try:
                self._say()
                left_alone = left_alone + 1 if self.told_to_end and self._place is None and self._others_are_over() else 0
            except RuntimeError:
                return
            if left_alone == 4:
                where = place(traceback.StackSummary.extract(traceback.walk_stack(sys._current_frames()[self._main])))[0]
                print(
                    f"error: step {self._step}: rank {self._rank} hangs in {where}; the others have ended",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(HANGS)

    def _others_are_over(self) -> bool:
        return all(sign["over"] for rank, sign in enumerate(self._read()) if rank != self._rank)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error is that of a collective whose other ranks did not answer."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_FAILED.search(str(error))))


def place(frames: Iterable[traceback.FrameSummary]) -> tuple[str, bool]:
    """Where a thread is, from its innermost frame outwards: `all_reduce (train/step.py:80)`; and whether it waits for others."""
    collective, inner = "", None
    for frame in frames:
        if frame.filename == __file__:
            continue  # saying where it is, it is nowhere
        if inner is None:
            inner = frame
            if ".wait(" in linecache.getline(frame.filename, frame.lineno or 0):
                collective = "wait"
        file = Path(frame.filename)
        if frame.filename == threading.__file__ and frame.name in ("wait", "join"):
            collective = frame.name  # for a thread of its own, a save's say, which waits for others
        elif "torch/distributed/" in file.as_posix():
            collective = frame.name if frame.name != "wrapper" else collective
        elif file.is_relative_to(_PACKAGE):
            if file.parent.name == "parallel" and file.name in ("collectives.py", "host.py"):
                collective = frame.name
                continue
            return f"{collective or frame.name} ({file.relative_to(_PACKAGE)}:{frame.lineno})", bool(collective)
    if inner is None:
        return "nothing", False
    return f"{collective or inner.name} ({Path(inner.filename).name}:{inner.lineno})", bool(collective)
