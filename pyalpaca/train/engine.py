"""What a training loop asks of whoever holds the weights and the optimizer: pyalpaca itself, or DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from pyalpaca.model import Starts, Tree
from pyalpaca.train.step import Metrics, Setup, TrainState, train_step

Step = Callable[[TrainState, Tensor, Tensor, Setup, Starts | None], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class Engine:
    """Every rank must call each of these at the same time.

    step: as `train_step`. weights: the parameter tree, to evaluate with, as long as the context lasts.
    whole: the state with all that `saving` writes, on the ranks that write it; another step may not begin before it is written
    or copied.
    """

    step: Step
    weights: Callable[[TrainState], AbstractContextManager[Tree]]
    whole: Callable[[TrainState], TrainState]


def native_engine(step: Step = train_step) -> Engine:
    """pyalpaca's own: the state itself holds everything."""
    return Engine(step, lambda state: nullcontext(state.params), lambda state: state)


def open_engine(state: TrainState, setup: Setup, step: Step = train_step) -> tuple[Engine, TrainState]:
    """The engine that the settings name, and the state that it goes on with."""
    if setup.config.engine == "deepspeed":
        from pyalpaca.train.deepspeed_engine import open_deepspeed

        return open_deepspeed(state, setup)
    return native_engine(step), state
