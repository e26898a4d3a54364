"""The pipes of one AI core over time: as a picture, and as a trace for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json
from collections.abc import Sequence
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


def lanes(timeline: Timeline) -> list[tuple[str, list[Entry]]]:
    """The pipes of the AI core whose entries were kept, by name, each with its entries; pipes without any are left out."""
    kept = [core for core in timeline.cores if core.entries]
    found = []
    for core, name in zip(kept, _names(kept), strict=True):
        for pipe in PIPES:
            entries = [entry for entry in core.entries if entry.pipe == pipe]
            if entries:
                found.append((f"{name} {pipe}", entries))
    return found


def _names(cores: Sequence[Core]) -> list[str]:
    vectors = [core for core in cores if core.kind == "AIV"]
    return [core.kind if core.kind == "AIC" or len(vectors) == 1 else f"AIV{vectors.index(core)}" for core in cores]


def draw(timeline: Timeline, title: str, path: Path, microseconds: float | None = None) -> None:
    """Write a PNG of the first `microseconds`, None for all: a row for each pipe, a bar for each instruction."""
    from matplotlib.figure import Figure

    rows = lanes(timeline)
    end = microseconds or timeline.seconds * 1e6
    figure = Figure(figsize=(12, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, (name, entries) in enumerate(rows):
        bars = [(entry.start, entry.end - entry.start) for entry in entries if entry.start < end]
        axes.broken_barh(bars, (i - 0.38, 0.76), facecolors=_COLOURS[name.split()[1]], edgecolor="white", linewidth=0.2)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    axes.set_xlabel("microseconds")
    axes.set_title(f"{title}: {LABEL}")
    axes.grid(axis="x", alpha=0.3)
    with atomic_file(path) as target:
        figure.savefig(target, format="png", dpi=110)


def trace(timeline: Timeline, title: str, path: Path) -> None:
    """Write the entries as Chrome's trace events: a thread for each pipe, microseconds, with the line of the kernel."""
    events: list[dict[str, object]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": f"{title}: {LABEL}"}}]
    for thread, (name, entries) in enumerate(lanes(timeline)):
        events.append({"ph": "M", "pid": 0, "tid": thread, "name": "thread_name", "args": {"name": name}})
        for entry in entries:
            event = {"ph": "X", "pid": 0, "tid": thread, "name": entry.name, "ts": round(entry.start, 4)}
            events.append(event | {"dur": round(entry.end - entry.start, 4), "args": {"line": entry.line}})
    with atomic_file(path) as target:
        target.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}) + "\n", encoding="utf-8")
