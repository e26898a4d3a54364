"""The pipes of one AI core over time: as a picture, and as a trace for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyalpaca.bench.ascend.timeline import PIPES, Core, Entry, Timeline
from pyalpaca.files import atomic_file

LABEL = "modelled, never measured"
_COLOURS = {
    "S": "#7f7f7f",
    "V": "#1f77b4",
    "M": "#d62728",
    "MTE1": "#9467bd",
    "MTE2": "#2ca02c",
    "MTE3": "#ff7f0e",
    "FIX": "#8c564b",
}


# What a pipe does, by the kind of its core: copies between global memory (HBM through L2) and the core's own memories.
_DOES = {
    "AIC": {
        "S": "scalar",
        "M": "matrix products",
        "MTE1": "L1 to L0A, L0B",
        "MTE2": "memory to L1",
        "FIX": "L0C to memory",
    },
    "AIV": {"S": "scalar", "V": "vector", "MTE2": "memory to UB", "MTE3": "UB to memory"},
}


@dataclass(frozen=True)
class Lane:
    """One pipe of a core that was kept: the core's name (AIC, AIV, AIV0, AIV1), the pipe's, its instructions in order."""

    core: str
    pipe: str
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """As "AIC MTE2: memory to L1"."""
        return f"{self.core} {self.pipe}: {_DOES[self.core[:3]][self.pipe]}"

    def busy(self, microseconds: float) -> float:
        """The share of the first `microseconds` in which it works."""
        return sum(max(0.0, min(entry.end, microseconds) - entry.start) for entry in self.entries) / microseconds


def lanes(timeline: Timeline) -> list[Lane]:
    """The pipes of the AI core whose entries were kept; pipes without any are left out."""
    kept = [core for core in timeline.cores if core.entries]
    found = []
    for core, name in zip(kept, _names(kept), strict=True):
        for pipe in PIPES:
            entries = tuple(entry for entry in core.entries if entry.pipe == pipe)
            if entries:
                found.append(Lane(name, pipe, entries))
    return found


def _names(cores: Sequence[Core]) -> list[str]:
    vectors = [core for core in cores if core.kind == "AIV"]
    return [core.kind if core.kind == "AIC" or len(vectors) == 1 else f"AIV{vectors.index(core)}" for core in cores]


def which_core(timeline: Timeline) -> str:
    """The core that is shown, in words."""
    cubes = sum(core.kind == "AIC" for core in timeline.cores)
    if cubes:
        return f"the AI core of {cubes} that ends last: a cube core (AIC) and its two vector cores (AIV)"
    return f"the vector core (AIV) of {len(timeline.cores)} that ends last"


def draw(timeline: Timeline, title: str, path: Path, microseconds: float | None = None) -> None:
    """Write a PNG of the first `microseconds`, None for all: a row for each pipe, a bar for each instruction."""
    from matplotlib.figure import Figure

    rows, whole = lanes(timeline), timeline.seconds * 1e6
    end = min(microseconds or whole, whole)
    figure = Figure(figsize=(12, 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, lane in enumerate(rows):
        bars = [(entry.start, entry.end - entry.start) for entry in lane.entries if entry.start < end]
        # No edges: they would hide bars of a pixel's width.
        axes.broken_barh(bars, (i - 0.38, 0.76), facecolors=_COLOURS[lane.pipe], linewidth=0)
        if i > 0 and lane.core != rows[i - 1].core:
            axes.axhline(i - 0.5, color="#444444", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [lane.name for lane in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, end)
    span = f"the whole launch, {whole:.0f} microseconds" if end == whole else f"the first {end:g} of {whole:.0f} microseconds"
    axes.set_xlabel(f"microseconds; a bar is an instruction ({LABEL})")
    axes.set_title(f"{title}: {LABEL}\n{which_core(timeline)}; {span}", fontsize=11)
    axes.grid(axis="x", alpha=0.3)
    shares = axes.twinx()
    shares.set_ylim(axes.get_ylim())
    shares.set_yticks(range(len(rows)), [f"{lane.busy(end) * 100:.0f} %" for lane in rows])
    shares.tick_params(length=0)
    shares.set_ylabel("busy in the time shown")
    with atomic_file(path) as target:
        figure.savefig(target, format="png", dpi=100)


def trace(timeline: Timeline, title: str, path: Path) -> None:
    """Write the entries as Chrome's trace events: a thread for each pipe, microseconds, with the line of the kernel."""
    process = f"{title}: {LABEL}; {which_core(timeline)}"
    events: list[dict[str, object]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": process}}]
    for thread, lane in enumerate(lanes(timeline)):
        events.append({"ph": "M", "pid": 0, "tid": thread, "name": "thread_name", "args": {"name": lane.name}})
        events.append({"ph": "M", "pid": 0, "tid": thread, "name": "thread_sort_index", "args": {"sort_index": thread}})
        for entry in lane.entries:
            event = {"ph": "X", "pid": 0, "tid": thread, "name": entry.name, "ts": round(entry.start, 4)}
            events.append(event | {"dur": round(entry.end - entry.start, 4), "args": {"line": entry.line}})
    with atomic_file(path) as target:
        target.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}) + "\n", encoding="utf-8")
