"""Two runs on the same data, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pyalpaca.report.runs import Run

BAR = 0.02
"""The published bar: the relative error of the loss stays below it at every step."""


@dataclass(frozen=True)
class Comparison:
    """errors: {step: |other - reference| / |reference|} of the steps that both have, infinite where a loss is not finite."""

    reference: Run
    other: Run
    errors: Mapping[int, float]
    bar: float

    @property
    def worst(self) -> int:
        """The step of the largest error."""
        return max(self.errors, key=lambda step: self.errors[step])

    @property
    def largest(self) -> float:
        return self.errors[self.worst]

    @property
    def passed(self) -> bool:
        return self.largest < self.bar


def compare(reference: Run, other: Run, bar: float = BAR) -> Comparison:
    """The comparison of two runs. ValueError if they share no step."""
    a, b = reference.losses, other.losses
    steps = sorted(a.keys() & b.keys())
    if not steps:
        raise ValueError(
            f"the runs share no step: {reference.name} has {min(a)} to {max(a)}, {other.name} {min(b)} to {max(b)}; "
            "compare runs of the same data"
        )

    def error(x: float, y: float) -> float:
        return abs(y - x) / max(abs(x), 1e-12) if math.isfinite(x) and math.isfinite(y) else math.inf

    return Comparison(reference, other, {step: error(a[step], b[step]) for step in steps}, bar)
