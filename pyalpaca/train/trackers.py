"""Other places that a run reports to beside its own files: TensorBoard, Weights & Biases, SwanLab, each by its own library."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from pyalpaca.train.config import TrainConfig

_PACKAGES = ("tensorboard", "wandb", "swanlab")


class Tracker(NamedTuple):
    """log(values by name, step) and close()."""

    log: Callable[[Mapping[str, float], int], object]
    close: Callable[[], object]


def require_trackers(config: TrainConfig) -> None:
    """ValueError if a library that the settings ask for is not installed; nothing is loaded."""
    for name in _PACKAGES:
        if getattr(config, name) and find_spec(name) is None:
            raise ValueError(f"--{name} needs a package that is not installed: pip install {name}")


def open_trackers(config: TrainConfig, run: Path) -> list[Tracker]:
    """One for each that the settings name. A run that resumes goes on with its own entry."""
    settings = dataclasses.asdict(config)
    found = []
    if config.tensorboard:
        writer: Any = import_module("torch.utils.tensorboard").SummaryWriter(config.tensorboard)

        def scalars(values: Mapping[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        found.append(Tracker(scalars, writer.close))
    if config.wandb:
        entry = f"{run.name}-{zlib.crc32(str(run.resolve()).encode()):08x}"
        of: Any = import_module("wandb").init(
            project=config.wandb, name=run.name, id=entry, resume="allow", config=settings, dir=str(run)
        )
        found.append(Tracker(lambda values, step: of.log(dict(values), step=step), of.finish))
    if config.swanlab:
        swanlab: Any = import_module("swanlab")
        swanlab.init(project=config.swanlab, experiment_name=run.name, config=settings, logdir=str(run / "swanlog"))
        found.append(Tracker(lambda values, step: swanlab.log(dict(values), step=step), swanlab.finish))
    return found
