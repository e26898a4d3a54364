"""`pyalpaca bench ascend`: the kernels for NPUs played against published rates, without an NPU: modelled, never measured."""

from __future__ import annotations

import argparse
import csv
import ctypes
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyalpaca.bench.ascend.cases import CASES, PUBLISHED, Case, Shape
from pyalpaca.bench.ascend.library import kernel_library
from pyalpaca.bench.ascend.picture import LABEL, draw, trace
from pyalpaca.bench.ascend.processors import ASSUMED, PROCESSORS, Assumed, Processor, costlier, each_costlier
from pyalpaca.bench.ascend.timeline import Timeline, play
from pyalpaca.bench.machine import rounded
from pyalpaca.files import atomic_file

_COLUMNS = ("kernel", "processor", "modelled us", "limit", "of the limit", "costs doubled", "bounded by", "measured by others")
_EPILOG = """examples:
  pyalpaca bench ascend --kernel rms_norm,rope
  pyalpaca bench ascend --kernel flash_forward --soc B2,B4 --shapes 1x2048x16x16x128
  pyalpaca bench ascend --kernel rms_norm --shapes 512x4096 --plot pipes.png --trace pipes.json

Each kernel of csrc/ascend runs on the emulation without values; its instructions take the published cycles, copies
share the published bandwidth, flags hold the pipes up. What no one publishes is assumed; the JSON says which."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="pyalpaca bench ascend",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"How long the kernels for Ascend NPUs would take, {LABEL}: a timeline of every core's pipes, the\n"
        "share of the peak, the pipe that bounds. Needs g++ (or $CXX) once, no NPU. The last line is one JSON object.\n\n"
        "kernels:\n" + "\n".join(f"  {name:<20}{case.text}; shapes {case.dims}" for name, case in CASES.items()),
        epilog=_EPILOG,
    )
    add = p.add_argument
    add("--kernel", type=_names, metavar="A,B", default=list(CASES), help="kernels to model (default: all)")
    add("--soc", type=_names, metavar="A,B", default=["B2"], help=f"processors of the 910: {', '.join(PROCESSORS)} (default: B2)")
    add("--shapes", type=_shapes, metavar="NxM,...", help="of one kernel, in its order of dimensions (default: a few usual ones)")
    add("--dtype", type=_names, metavar="A,B", default=["bfloat16"], help="bfloat16, half, float (default: bfloat16)")
    add("--trace", type=Path, metavar="FILE", help="also write the pipes of one AI core for chrome://tracing or ui.perfetto.dev")
    add("--plot", type=Path, metavar="PNG", help="also draw the pipes of one AI core (needs matplotlib)")
    add("--window", type=float, metavar="US", help="microseconds that --plot shows (default: all)")
    add("--costs", action="store_true", help="also double each assumed cost alone, to see which the figure rests on (slower)")
    add("--csv", type=Path, metavar="FILE", help="also write the rows as comma-separated values")
    add("--json", type=Path, metavar="FILE", help="also write the JSON object to a file")
    add("--markdown", type=Path, metavar="FILE", help="also write a page with the table and what it rests on")
    return p


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _shapes(text: str) -> list[Shape]:
    try:
        return [tuple(int(n) for n in shape.split("x")) for shape in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of shapes; write them as 8192x4096,4096x4096") from None


def check(args: argparse.Namespace) -> None:
    """ValueError for names and shapes that there are not, before anything is compiled."""
    for kind, asked, known in (("kernel", args.kernel, CASES), ("processor", args.soc, PROCESSORS)):
        for name in asked:
            if name not in known:
                raise ValueError(f"there is no {kind} {name!r}: choose from {', '.join(known)}")
    for name in args.kernel:
        for dtype in args.dtype:
            if dtype not in CASES[name].dtypes:
                raise ValueError(f"{name} has no type {dtype!r}: choose from {', '.join(CASES[name].dtypes)}")
        for shape in args.shapes or ():
            dims = CASES[name].dims
            if len(shape) != len(dims.split(" x ")) or min(shape) < 1:
                raise ValueError(f"{name}: the shape {'x'.join(map(str, shape))} is not {dims}, all at least 1")
    if (args.plot or args.trace) and len(args.kernel) * len(args.soc) * len(args.dtype) * len(args.shapes or (1,)) != 1:
        raise ValueError("--plot and --trace show one kernel: name one with --kernel, one --shapes, one --soc and one --dtype")
    if args.plot and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed: `pip install 'pyalpaca[plot]'`")


def model(
    library: ctypes.CDLL,
    name: str,
    case: Case,
    processor: Processor,
    shape: Shape,
    dtype: str,
    entries: bool,
    costs: bool = False,
) -> tuple[dict[str, Any], Timeline]:
    """The row of one kernel, and the timeline of its first launch; `costs` adds the shares with each cost doubled alone."""
    work = case.make(library, processor, shape, dtype)

    def seconds_with(assumed: Assumed) -> float:
        return sum(play(library, launch, processor, assumed).seconds for launch in work.launches)

    doubled = seconds_with(costlier(ASSUMED, 2))
    timelines = [play(library, launch, processor, entries=entries) for launch in work.launches]
    seconds = sum(timeline.seconds for timeline in timelines)
    longest = max(timelines, key=lambda timeline: timeline.seconds)
    peak = processor.hbm if work.limit == "hbm" else processor.flops
    busy = {pipe: rounded(share) for pipe, share in longest.busy.items()}
    busy["HBM"] = rounded(longest.hbm_bytes / longest.seconds / processor.hbm)
    busy["L2"] = rounded(longest.l2_bytes / longest.seconds / processor.l2)
    row: dict[str, Any] = {
        "name": f"{name}/{dtype}/{'x'.join(map(str, shape))}",
        "processor": processor.name,
        "modelled": True,
        "seconds": rounded(seconds),
        "limit": work.limit,
        "limit_share": rounded(work.amount / seconds / peak),
        "limit_share_costs_doubled": rounded(work.amount / doubled / peak),
        "bound": max(busy, key=lambda name: busy[name]),
        "busy": busy,
        "hbm_bytes": sum(timeline.hbm_bytes for timeline in timelines),
        "l2_bytes": sum(timeline.l2_bytes for timeline in timelines),
        "cube_flops": sum(timeline.cube_flops for timeline in timelines),
        "launches": len(timelines),
    }
    if costs:
        alone = {cost: seconds_with(assumed) for cost, assumed in each_costlier(ASSUMED, 2).items()}
        row["limit_share_one_cost_doubled"] = {cost: rounded(work.amount / taken / peak) for cost, taken in alone.items()}
    measured = PUBLISHED.get(name, {}).get(shape[1]) if processor.name == "910B2" and shape[-1] == 128 else None
    if measured:
        row["measured_by_others"] = {"vendor": measured[0], "best_public": measured[1]}
    return row, timelines[0]


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row as text, in the order of the columns."""
    others = row.get("measured_by_others")
    return (
        row["name"],
        row["processor"],
        f"{row['seconds'] * 1e6:.1f}",
        "1.6 TB/s" if row["limit"] == "hbm" else "cube",
        f"{row['limit_share'] * 100:.0f} %",
        f"{row['limit_share_costs_doubled'] * 100:.0f} %",
        f"{row['bound']}, busy {row['busy'][row['bound']] * 100:.0f} %",
        f"vendor {others['vendor'] * 100:.0f} %, best {others['best_public'] * 100:.0f} %" if others else "-",
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows in columns, under a line that says what they are."""
    lines = [_COLUMNS, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"{LABEL}: no NPU took part", *text])


def costs_table(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Of rows that have them: the share of the limit with each assumed cost doubled alone, the dearest first."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if alone := row.get("limit_share_one_cost_doubled"):
            order = sorted(alone, key=lambda cost: alone[cost])
            shares = ", ".join(f"{cost} {alone[cost] * 100:.0f} %" for cost in order)
            lines.append((row["name"], row["processor"], f"{row['limit_share'] * 100:.0f} %", shares))
    return lines


def page(result: Mapping[str, Any]) -> str:
    """The same as a page of Markdown, with what it rests on."""
    lines = [_COLUMNS, tuple("---" for _ in _COLUMNS), *(cells(row) for row in result["rows"])]
    assumed = "\n".join(f"- {name}: {value:g}" for name, value in result["assumed"].items())
    return "\n".join(
        [
            f"# The kernels for Ascend NPUs, {LABEL}",
            "",
            "Made by `pyalpaca bench ascend`: the kernels' instructions, played against published rates. No NPU took part.",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            "Assumed, because nobody publishes it (bytes a cycle for paths, else cycles); `costs doubled` is the share of the",
            "limit with all of this twice as costly:",
            "",
            assumed,
            "",
            *_costs_lines(result["rows"]),
        ]
    )


def _costs_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = costs_table(rows)
    if not lines:
        return []
    head = (("kernel", "processor", "of the limit", "with this cost alone doubled"), ("---",) * 4)
    text = "Which of them the figures rest on: the share of the limit with one cost doubled, the dearest first."
    return [text, "", *(f"| {' | '.join(line)} |" for line in [*head, *lines]), ""]


def main(argv: Sequence[str] | None = None) -> int:
    """Model and print; ValueError, OSError or RuntimeError, one sentence, for what can't be modelled."""
    args = parser().parse_args(argv)
    check(args)
    library = kernel_library()
    rows: list[dict[str, Any]] = []
    timeline, title = None, ""
    for soc in args.soc:
        for name in args.kernel:
            case = CASES[name]
            shapes = args.shapes or (case.shapes[:1] if args.plot or args.trace else case.shapes)
            for shape in shapes:
                for dtype in args.dtype:
                    entries = bool(args.plot or args.trace)
                    row, timeline = model(library, name, case, PROCESSORS[soc], shape, dtype, entries, args.costs)
                    title = f"{row['name']} on {row['processor']}"
                    rows.append(row)
    result = {
        "bench": "ascend",
        "label": LABEL,
        "limits": {PROCESSORS[soc].name: {"hbm": PROCESSORS[soc].hbm, "cube": PROCESSORS[soc].flops} for soc in args.soc},
        "assumed": asdict(ASSUMED),
        "rows": rows,
    }
    if timeline is not None and args.plot:
        draw(timeline, title, args.plot, args.window)
    if timeline is not None and args.trace:
        trace(timeline, title, args.trace)
    if args.csv:
        held = io.StringIO()
        csv.writer(held).writerows([_COLUMNS, *(cells(row) for row in rows)])
        _write(args.csv, held.getvalue())
    if args.markdown:
        _write(args.markdown, page(result))
    if args.json:
        _write(args.json, json.dumps(result) + "\n")
    print(table(rows))
    for kernel, soc, share, alone in costs_table(rows):
        print(f"{kernel} on {soc}: {share} of its limit; with one assumed cost doubled: {alone}")
    print(json.dumps(result))
    return 0


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")
