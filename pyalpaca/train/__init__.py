"""The train room: a loop around a pure step. `TrainConfig` says what to do, `train` does it."""

from __future__ import annotations

from typing import Any

from pyalpaca.train.config import TrainConfig as TrainConfig
from pyalpaca.train.flags import parse as parse
from pyalpaca.train.flags import read_toml as read_toml
from pyalpaca.train.table import markdown_table as markdown_table
from pyalpaca.train.table import performance_row as performance_row
from pyalpaca.train.table import throughput as throughput


def train(config: TrainConfig) -> dict[str, Any]:
    """Run the training that `config` describes; see `pyalpaca.train.loop`. torch is loaded here, not before."""
    from pyalpaca.train.loop import train as run

    return run(config)
