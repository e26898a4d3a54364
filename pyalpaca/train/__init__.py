"""The train room: a loop around a pure step. `TrainConfig` says what to do, `train` does it."""

from __future__ import annotations

from typing import Any

from pyalpaca.train.config import TrainConfig as TrainConfig
from pyalpaca.train.flags import parse as parse


def train(config: TrainConfig) -> dict[str, Any]:
    """Run the training that `config` describes; see `pyalpaca.train.loop`. torch is loaded here, not before."""
    from pyalpaca.train.loop import train as run

    return run(config)
