"""The roofline picture (Williams, Waterman and Patterson 2009): each row by its flops per byte and flops per second."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyalpaca.files import atomic_file

_MARKERS = {"fwd": "o", "bwd": "^", "both": "s"}


def require_matplotlib() -> None:
    """ValueError if nothing can be drawn, before minutes are spent on measuring."""
    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'pyalpaca[plot]'")


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Colours are operators, markers directions; the fastest peer of each row stands below it as a small cross."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows, limits = result["rows"], result["limits"]
    compute = next(value for name, value in limits.items() if name.endswith("_flops"))
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots()
    intensities = [row["flops"] / row["bytes"] for row in rows] or [1.0]
    left, right = min(intensities) / 3, max(max(intensities) * 3, 3 * compute / limits["copy_bytes"])
    for key, style in (("copy_bytes", "-"), ("read_bytes", "--")):
        knee = compute / limits[key]
        axes.plot([left, knee, right], [left * limits[key], compute, compute], color="black", linewidth=1.2, linestyle=style)
        axes.annotate(
            f"{key.removesuffix('_bytes')} {limits[key] / 1e9:.0f} GB/s",
            (left * 1.15, left * 1.15 * limits[key]),
            xytext=(0, 62 if limits[key] == max(limits["copy_bytes"], limits["read_bytes"]) else -14),
            textcoords="offset points",
            fontsize=8,
        )
    axes.annotate(
        f"{compute / 1e9:.0f} GFLOP/s", (right, compute), xytext=(-4, 5), textcoords="offset points", ha="right", fontsize=8
    )
    operators = list(dict.fromkeys(row["name"].split("/")[0] for row in rows))
    colors = {name: colormaps["tab20"](i % 20) for i, name in enumerate(operators)}
    for row, intensity in zip(rows, intensities, strict=True):
        operator, direction, *_ = row["name"].split("/")
        color, rate = colors[operator], row["flops"] / row["seconds"]
        if row["peers"]:
            best = row["flops"] / min(peer["seconds"] for peer in row["peers"].values())
            axes.plot([intensity, intensity], [best, rate], color=color, linewidth=0.6, alpha=0.5)
            axes.plot(intensity, best, marker="x", markersize=4, color=color, alpha=0.7)
        axes.plot(intensity, rate, marker=_MARKERS[direction], markersize=6, color=color, alpha=0.85, markeredgewidth=0)
    axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="flops per byte that must move", ylabel="flops per second")
    handles = [Line2D([], [], color=colors[name], marker="o", linestyle="", label=name) for name in operators]
    handles += [Line2D([], [], color="grey", marker=_MARKERS[d], linestyle="", label=d) for d in _shown(rows)]
    handles.append(Line2D([], [], color="grey", marker="x", linestyle="", label="the fastest peer"))
    axes.legend(handles=handles, fontsize=8, loc="lower right")
    axes.grid(alpha=0.25, which="both", linewidth=0.4)
    machine = result["machine"]
    axes.set_title(f"{machine['cpu']}, {machine['threads']} threads, {machine['date']}, commit {machine['commit']}", fontsize=10)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)


def _shown(rows: list[Mapping[str, Any]]) -> list[str]:
    directions = {row["name"].split("/")[1] for row in rows}
    return [direction for direction in _MARKERS if direction in directions]
