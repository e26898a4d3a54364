"""The picture of a plan: the memory of each stage, by part, beside what a device has."""

from __future__ import annotations

from pathlib import Path

from pyalpaca.files import atomic_file
from pyalpaca.plan.estimate import Plan
from pyalpaca.plan.page import PARTS, layout_name, recompute_name

_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#d62728", "#8c564b")


def draw(plan: Plan, name: str, out: Path) -> None:
    """Write the picture, a PNG. ValueError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ValueError(f"drawing needs {missing.name}: pip install 'pyalpaca[plot]'") from None
    job, count = plan.job, len(plan.stages)
    figure = Figure(figsize=(9, 2.2 + 0.55 * count), layout="constrained")
    axes = figure.subplots()
    names = [
        f"stage {s}\n{stage.layers} layers" if count > 1 else f"{stage.layers} layers" for s, stage in enumerate(plan.stages)
    ]
    left = [0.0] * count
    for part, colour in zip(PARTS, _COLOURS, strict=True):
        sizes = [getattr(stage.memory, part) / 1e9 for stage in plan.stages]
        axes.barh(names, sizes, left=left, height=0.6, color=colour, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for at, total in enumerate(left):
        axes.text(total, at, f" {total:.1f}", va="center")
    room = plan.room / 1e9
    axes.axvline(room, color="black", linewidth=1.2, linestyle="--", label=f"{plan.device.name}: {room:.0f}")
    axes.set_xlim(0, 1.12 * max(room, *left))
    axes.invert_yaxis()
    axes.set_xlabel("GB on a device")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8)
    recompute = recompute_name(job.recompute, job.recompute_every)
    figure.suptitle(f"{name}, {layout_name(job)}, micro batch {job.micro_batch} x {job.seq}, {job.dtype}, recompute {recompute}")
    with atomic_file(out) as partial:
        figure.savefig(partial, format="png", dpi=120)
