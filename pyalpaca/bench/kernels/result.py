"""The JSON object of a run, and one of several: a long run may be taken in pieces."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyalpaca.bench.kernels.limits import Limits
from pyalpaca.bench.kernels.targets import judge, means
from pyalpaca.bench.machine import rounded

_SAME = ("cpu", "cores", "threads", "torch", "commit")


def result_of(
    machine: Mapping[str, Any], device: str, limits: Limits, rows: Sequence[dict[str, Any]], *, quick: bool
) -> dict[str, Any]:
    """All of one run. quick: it was too short to judge by."""
    import torch

    here = {**machine, "device": device, "capability": torch.backends.cpu.get_cpu_capability()}
    return _finish(here, limits.summary(), dict(limits.probes), list(rows), quick)


def _finish(
    machine: Mapping[str, Any], limits: Mapping[str, float], probes: Mapping[str, float], rows: list[dict[str, Any]], quick: bool
) -> dict[str, Any]:
    overall, groups = means(rows)
    return {
        "bench": "kernels",
        "machine": dict(machine),
        "quick": quick,
        "limits": dict(limits),
        "probes": dict(probes),
        "rows": rows,
        "geomean": overall,
        "geomean_by": groups,
        "targets": judge(rows),
    }


def read(path: Path) -> dict[str, Any]:
    """The JSON object of an earlier run; ValueError if the file holds none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        result = None
    if not isinstance(result, dict) or result.get("bench") != "kernels":
        raise ValueError(f"{path}: is not the result of this benchmark; give files that --json wrote")
    return result


def join(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs on one machine as one: each row keeps the share of its own run's limits, the limits are their medians.

    ValueError if they are of different machines or versions, or have a row in common.
    """
    first = results[0]
    for key in _SAME:
        found = dict.fromkeys(str(result["machine"].get(key)) for result in results)
        if len(found) > 1:
            raise ValueError(f"the runs differ in {key}: {' and '.join(found)}; join runs of one machine and one commit")
    rows = [row for result in results for row in result["rows"]]
    names = [row["name"] for row in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two of the runs have the row {twice}: leave one of them out")
    limits, probes = (
        {name: rounded(statistics.median(r[key][name] for r in results if name in r[key])) for name in first[key]}
        for key in ("limits", "probes")
    )
    return _finish(first["machine"], limits, probes, rows, any(result["quick"] for result in results))
