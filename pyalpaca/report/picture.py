"""The picture of runs: the losses above, their relative errors, and what else the steps have recorded below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyalpaca.files import atomic_file
from pyalpaca.report.compare import Comparison
from pyalpaca.report.runs import Run

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")

# key of a record, what it says, unit factor, whether its axis is logarithmic
_PANELS = (
    ("learning_rate", "learning rate", 1.0, False),
    ("grad_norm", "gradient norm", 1.0, True),
    ("tokens_per_second_per_device", "tokens/s/p", 1.0, False),
    ("memory_bytes", "memory, GB", 1e-9, False),
)


def draw(runs: Sequence[Run], comparisons: Sequence[Comparison], out: Path) -> None:
    """Write the picture, a PNG. ValueError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ValueError(f"drawing needs {missing.name}: pip install 'pyalpaca[plot]'") from None
    panels = [panel for panel in _PANELS if any(run.series(panel[0]) for run in runs)]
    wide = ["loss", *(["error"] if comparisons else [])]
    rows: list[Any] = [[name, name] for name in wide]
    for i in range(0, len(panels), 2):
        pair = [panel[0] for panel in panels[i : i + 2]]
        rows.append(pair if len(pair) == 2 else pair * 2)
    heights = [3.0 if row[0] == "loss" else 2.0 if row[0] == "error" else 1.7 for row in rows]
    figure = Figure(figsize=(9, 1.2 + 0.95 * sum(heights)), layout="constrained")
    axes = figure.subplot_mosaic(rows, height_ratios=heights)
    _losses(axes["loss"], runs)
    if comparisons:
        _errors(axes["error"], comparisons)
    for key, name, factor, logarithmic in panels:
        _panel(axes[key], runs, key, name, factor, logarithmic)
    for axis in {id(axis): axis for axis in axes.values()}.values():
        axis.grid(alpha=0.3)
    for name in set(rows[-1]):
        axes[name].set_xlabel("step")
    figure.suptitle(_title(runs, comparisons))
    with atomic_file(out) as partial:
        figure.savefig(partial, format="png", dpi=120)


def labels(runs: Sequence[Run]) -> list[str]:
    """Short names for a legend: as many last parts of the paths as tell them apart, of each at most 40 characters."""
    parts = [Path(run.name).parts for run in runs]
    parts = [p[:-1] if len(p) > 1 and p[-1] == "metrics.jsonl" else p for p in parts]
    names = ["/".join(p) for p in parts]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return [name if len(name) <= 40 else f"..{name[-38:]}" for name in names]


def _title(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return labels(runs)[0]
    return f"Loss accuracy: largest relative error {max(found.largest for found in comparisons):.2e}"


def _losses(axis: Any, runs: Sequence[Run]) -> None:
    for i, (run, name) in enumerate(zip(runs, labels(runs), strict=True)):
        colour = _COLOURS[i % len(_COLOURS)]
        style = _under(i, runs) or {"linewidth": 1.2, "linestyle": _dashes(i, len(runs) - 1)}
        _line(axis, run.losses, color=colour, label=name if len(runs) > 1 else "lm loss", **style)
        _mark_bad(axis, run.losses, colour)
    evaluated = [(i, valid) for i, run in enumerate(runs) if (valid := run.series("valid_loss"))]
    for n, (i, valid) in enumerate(evaluated):
        style = {"color": _COLOURS[i % len(_COLOURS)], "markeredgecolor": "black", "label": "" if n else "validation"}
        axis.plot(list(valid), list(valid.values()), "o", markersize=4, **style)
    axis.set_ylabel("lm loss")
    axis.legend()


def _dashes(i: int, others: int) -> Any:
    """The line style of the i-th run of several: where they agree, the dashes of each lie in the gaps of the others."""
    if i == 0 or others < 2:
        return "--" if i else "-"
    return 5 * (i - 1), (5, 5 * (others - 1))


def _errors(axis: Any, comparisons: Sequence[Comparison]) -> None:
    names = labels([comparisons[0].reference, *(found.other for found in comparisons)])
    for i, found in enumerate(comparisons, 1):
        # A logarithm has no place for zero: equal losses are drawn at the resolution of fp32.
        floor = {step: max(error, 1e-8) for step, error in found.errors.items()}
        colour = _COLOURS[i % len(_COLOURS)]
        _line(axis, floor, color=colour, linewidth=1.2, label=names[i])
        _mark_bad(axis, found.errors, colour)
    axis.set_yscale("log")
    bar = comparisons[0].bar
    axis.axhline(bar, color="black", linewidth=1, linestyle=":", label=f"bar {bar:g}")
    axis.set_ylabel("relative error")
    axis.legend(loc="lower left", ncols=min(len(comparisons) + 1, 3), fontsize=8, framealpha=0.7)


def _panel(axis: Any, runs: Sequence[Run], key: str, name: str, factor: float, logarithmic: bool) -> None:
    for i, run in enumerate(runs):
        values = {step: value * factor for step, value in run.series(key).items()}
        _line(axis, values, color=_COLOURS[i % len(_COLOURS)], **(_under(i, runs) or {"linewidth": 1.0}))
        _mark_bad(axis, values, _COLOURS[i % len(_COLOURS)])
    shown = [v for run in runs for v in run.series(key).values() if math.isfinite(v)]
    if logarithmic and shown and min(shown) > 0 and max(shown) / min(shown) > 20:
        axis.set_yscale("log")
    elif shown and max(shown) > 0:
        axis.set_ylim(0, 1.1 * factor * max(shown))
    axis.set_ylabel(name)


def _under(i: int, runs: Sequence[Run]) -> dict[str, Any]:
    """The style of the first of several runs: it lies under the others, wider, so that both are seen where they agree."""
    return {"linewidth": 2.5, "alpha": 0.6} if i == 0 and len(runs) > 1 else {}


def _line(axis: Any, values: Mapping[int, float], **style: Any) -> None:
    """A line through the steps; a single one would not be seen, so it gets a dot."""
    axis.plot(list(values), list(values.values()), marker="o" if len(values) == 1 else None, markersize=4, **style)


def _mark_bad(axis: Any, values: Mapping[int, float], colour: str) -> None:
    """What is not finite has no place on an axis: a cross at its upper edge says at which step it was."""
    steps = [step for step, value in values.items() if not math.isfinite(value)]
    if steps:
        axis.plot(steps, [0.97] * len(steps), "x", color=colour, transform=axis.get_xaxis_transform(), label="not finite")
