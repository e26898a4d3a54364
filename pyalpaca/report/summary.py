"""Runs and comparisons in words: Markdown that reads well in a terminal, too."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from pyalpaca.report.compare import Comparison
from pyalpaca.report.runs import Run
from pyalpaca.train import markdown_table, performance_row, throughput

_SHOWN = 12
_TIMING = ("seconds", "global_batch_size", "seq_length", "tflops", "model_tflops", "hfu", "mfu", "memory_bytes")
_SETTINGS = ("devices", "device", "parameters", "tp", "cp", "pp", "sequence_parallel", "schedule", "zero")


def performance(runs: Sequence[Run]) -> str:
    """The published performance table with a row for each run that has recorded what it takes; nothing if none has."""
    rows = []
    for run in runs:
        timed = [record for record in run.steps.values() if all(key in record for key in _TIMING)]
        if timed and all(key in run.settings for key in _SETTINGS):
            summary = throughput(timed, int(run.settings["devices"]))
            summary["memory_bytes"] = max(record["memory_bytes"] for record in timed)
            rows.append({"run": run.name, **performance_row(summary, run.settings)})
    return markdown_table(rows) if rows else ""


def course(run: Run) -> str:
    """What became of a run, in a sentence or two."""
    losses, first, last = run.losses, min(run.steps), max(run.steps)
    finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    said = [f"steps {first} to {last}", f"loss {losses[first]:.4f} -> {losses[last]:.4f}"]
    if finite:
        lowest = min(finite, key=lambda step: finite[step])
        said.append(f"lowest {finite[lowest]:.4f} at {lowest}")
    for key, name in (("valid_loss", "validation"), ("test_loss", "test")):
        if found := run.series(key):
            best = min(found, key=lambda step: found[step])
            said.append(f"{name} loss {found[best]:.4f} at {best}" if key == "valid_loss" else f"{name} loss {found[best]:.4f}")
    norms = [norm for norm in run.series("grad_norm").values() if math.isfinite(norm)]
    if norms:
        said.append(f"gradient norm {statistics.median(norms):.3g}, at most {max(norms):.3g}")
    final = run.steps[last]
    for key, name in (("skipped", "skipped"), ("nan_steps", "not finite")):
        if final.get(key):
            said.append(f"{final[key]:.0f} steps {name}")
    if bad := len(losses) - len(finite):
        said.append(f"{bad} losses not finite")
    return f"{run.name}: " + ", ".join(said)


def comparison_table(found: Comparison) -> str:
    """Some steps of both, the worst among them."""
    steps = list(found.errors)
    shown = sorted({*steps[:: max(len(steps) // (_SHOWN - 2), 1)], found.worst, steps[-1]})
    a, b = found.reference.losses, found.other.losses
    rows = [
        {
            "step": f"{step}",
            "reference": f"{a[step]:.6f}",
            "other": f"{b[step]:.6f}",
            "rel. error": f"{found.errors[step]:.2e}",
            "": "<- largest" if step == found.worst and found.largest else "",
        }
        for step in shown
    ]
    return markdown_table(rows)


def verdict(found: Comparison) -> str:
    """Whether the bar holds, in a line."""
    holds = "below" if found.passed else "NOT below"
    return (
        f"{found.other.name} against {found.reference.name}: {len(found.errors)} steps, largest relative error "
        f"{found.largest:.2e} at step {found.worst}: {holds} {found.bar:g}"
    )


def summary(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> str:
    """All of it."""
    parts = [performance(runs), "\n".join(f"- {course(run)}" for run in runs)]
    for found in comparisons:
        parts += [comparison_table(found), verdict(found)]
    return "\n\n".join(part for part in parts if part)


def as_json(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The last line of the command: of one run its steps and losses, of several the worst comparison and each of them."""
    if not comparisons:
        (run,) = runs
        losses = run.losses
        return {"steps": len(run.steps), "loss_first": _finite(losses[min(losses)]), "loss_last": _finite(losses[max(losses)])}
    worst = max(comparisons, key=lambda found: found.largest)
    return {
        **_fields(worst),
        "passed": all(found.passed for found in comparisons),
        "runs": [{"run": found.other.name, **_fields(found), "passed": found.passed} for found in comparisons],
    }


def _fields(found: Comparison) -> dict[str, Any]:
    return {"steps": len(found.errors), "max_relative_error": _finite(found.largest), "worst_step": found.worst}


def _finite(value: float) -> float | None:
    """JSON has no infinity: a loss that is not finite leaves no error to give."""
    return value if math.isfinite(value) else None
