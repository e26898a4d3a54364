"""A run as its folder records it: a record of every step, and the settings if they are there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """name: as it was given. steps: {step: its record}, in order. settings: of train.json, empty if there is none."""

    name: str
    steps: Mapping[int, Mapping[str, Any]]
    settings: Mapping[str, Any]

    def series(self, key: str) -> dict[int, float]:
        """{step: value} of the steps that have recorded it."""
        return {step: float(record[key]) for step, record in self.steps.items() if _is_number(record.get(key))}

    @property
    def losses(self) -> dict[int, float]:
        return self.series("loss")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_run(run: str | Path) -> Run:
    """A run folder or a metrics.jsonl. ValueError naming the line that is not a record of a step."""
    path = Path(run)
    if path.is_dir():
        path = path / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; give the --output folder of a training run, which holds metrics.jsonl")
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
            steps[int(record["step"])] = {**record, "loss": float(record["loss"])}
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            raise ValueError(f'{path}: line {number} is no record of a step, expected JSON with "step" and "loss"') from None
    if not steps:
        raise ValueError(f"{path}: holds no steps yet; wait until the run has logged one")
    return Run(str(run), dict(sorted(steps.items())), _settings(path.parent / "train.json"))


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not JSON ({error}), expected a run's settings; remove it to do without them") from None
    return found if isinstance(found, dict) else {}
