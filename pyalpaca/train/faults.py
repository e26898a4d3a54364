"""What keeps a run's promises when something goes wrong around its steps: signals, saves that fail, ranks that are lost."""

from __future__ import annotations

import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from pyalpaca.parallel import PeerLostError, Watch, agree, host_group, remember, remembered
from pyalpaca.train.saving import Saver
from pyalpaca.train.step import Setup, TrainState

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAVE_FAILED = 1000  # above all signals
_IMPATIENCE = 1.0


class Guard:
    """Stands around a training loop; every rank has one and calls its methods at the same steps.

    SIGTERM, and SIGINT once, are held until the end of the running step. A SIGINT more than a second after the first is a
    KeyboardInterrupt at once; within that second it may be the same Ctrl-C, which torchrun hands on. Where a collective fails,
    the lost rank is named on stderr, on every rank and before torchrun ends it, and a PeerLostError is raised. Leaving the
    context waits for the last save.
    """

    def __init__(self, run: Path, setup: Setup, step: int = 0) -> None:
        self._saver = Saver(run, setup)
        self._group = host_group(setup.config.timeout)
        self._watch = Watch(self._group, step + 1)
        self._caught, self._since = 0, 0.0
        self._exits = ExitStack()
        remember(_key(run))

    def __enter__(self) -> Guard:
        if threading.current_thread() is threading.main_thread():  # Python's rule for signals
            for number in _SIGNALS:
                self._exits.callback(signal.signal, number, signal.signal(number, self._catch))
        # On the way out, the last comes first; each sees the error that those before it have raised.
        self._exits.push(self._saver)
        self._exits.push(_report)
        self._exits.push(self._watch.__enter__())
        self._exits.push(lambda kind, *_: self._saver.wait() if kind is None else None)
        return self

    def end_step(self, state: TrainState) -> int:
        """The number of a signal that some rank has got by now, or 0; the same on every rank.

        Raises, on every rank, the error of a save that has failed meanwhile, or a FloatingPointError if some ranks have updated
        their weights and others have found their gradients not finite.
        """
        word = _SAVE_FAILED if self._saver.failed else self._caught
        word, most, least = agree([word, state.updates, -state.updates], self._group)
        if most != -least:
            raise FloatingPointError(
                f"step {state.step}: some ranks found a gradient that is not finite where others did not, so their copies of the "
                "weights differ; look for a faulty device, then go on with --resume"
            )
        if word == _SAVE_FAILED:
            self._saver.wait()
        self._watch.begin_step(state.step + 1)
        return word

    def save(self, state: TrainState, *links: str) -> Path:
        """See Saver.save."""
        return self._saver.save(state, *links)

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._caught and number == signal.SIGINT and now - self._since > _IMPATIENCE:
            raise KeyboardInterrupt
        self._since = self._since or now
        self._watch.told_to_end = True
        self._caught = max(self._caught, number)


def _report(kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
    if isinstance(error, PeerLostError):  # at once: torchrun's SIGTERM is still held back
        print(f"error: {error}", file=sys.stderr, flush=True)


def began_here(run: Path) -> bool:
    """Whether torchrun has started this process again, and an earlier one of its has begun or resumed this run."""
    return remembered(_key(run))


def _key(run: Path) -> str:
    return f"pyalpaca/run/{run.resolve()}"
