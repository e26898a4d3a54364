"""Geometric means of ratios, as every benchmark sums its rows up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers, at least one."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def geometric_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """{peer: geometric mean over the rows of the peer's time over ours}."""
    peers = dict.fromkeys(peer for row in rows for peer in row["vs"])
    return {peer: round(geometric_mean(row["vs"][peer] for row in rows if peer in row["vs"]), 3) for peer in peers}
