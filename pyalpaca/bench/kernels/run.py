"""`pyalpaca bench kernels`: every operator beside this machine's own limits and beside its peers, in one process and one run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyalpaca.bench.kernels.measure import Plan

_EPILOG = """examples:
  pyalpaca bench kernels --op rms_norm,rope --dtype float32 --threads 2
  pyalpaca bench kernels --json kernels.json --csv kernels.csv --plot kernels.png --markdown kernels.md
  pyalpaca bench kernels --from norms.json attention.json --markdown kernels.md"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="pyalpaca bench kernels",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure this machine's own limits (products of matrices, copying and reading memory), then each operator\n"
        "beside its peers, in turn: median time with the caches full and emptied, GFLOP/s, GB/s, share of the limit,\n"
        "peak memory, page faults, the peers' time over ours. The last line on stdout is one JSON object.",
        epilog=_EPILOG,
    )
    add = p.add_argument
    add("--op", type=_names, metavar="A,B", help="operators to measure (default: all; a wrong name lists them)")
    add("--dtype", type=_names, metavar="A,B", help="float32, bfloat16, float16, int8, int4 (default: all that an operator has)")
    add("--direction", type=_names, metavar="A,B", help="fwd, bwd, both: one after the other in one call (default: all)")
    add("--shapes", type=_names, metavar="A,B", help="labels such as llama7b/2048, or what they begin with: llama7b, small")
    add(
        "--peers",
        type=_names,
        metavar="A,B",
        help="plain, compile, sdpa, ... (default: all that are installed, compile once an operator)",
    )
    add("--threads", type=int, metavar="N", help="threads for ours and for the peers (default: as many as torch takes)")
    add("--device", choices=("cpu", "npu"), help="where to run (default: the NPU if there is one, else the CPU)")
    add("--seconds", type=float, default=0.25, metavar="S", help="time for each contestant of a row (default: 0.25)")
    add("--quick", action="store_true", help="seconds in all, not to be quoted: small shapes, few calls, no compile")
    add("--csv", type=Path, metavar="FILE", help="also write the rows as a table of comma-separated values")
    add("--plot", type=Path, metavar="PNG", help="also draw them under the roofline (needs matplotlib)")
    add("--json", type=Path, metavar="FILE", help="also write the JSON object to a file")
    add("--markdown", type=Path, metavar="FILE", help="also write a page with the results and how they were measured")
    add("--from", type=Path, dest="earlier", nargs="+", metavar="FILE", help="print what earlier --json files hold, together")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; ValueError or OSError, one sentence, for what can't be measured here."""
    args = parser().parse_args(argv)
    if args.plot is not None:
        from pyalpaca.bench.kernels.picture import require_matplotlib

        require_matplotlib()
    # Known before minutes are spent on measuring.
    for path in filter(None, (args.json, args.csv, args.markdown, args.plot)):
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, expected a file or nothing; choose another output file")
    if args.earlier:
        from pyalpaca.bench.kernels.result import join, read

        result = join([read(path) for path in args.earlier])
    else:
        result = _run(args)
    from pyalpaca.bench.kernels.page import csv_table, page, table

    print(table(result))
    for path, make in ((args.json, _dump), (args.csv, csv_table), (args.markdown, page)):
        if path is not None:
            _write(path, make(result))
    if args.plot is not None:
        from pyalpaca.bench.kernels.picture import draw

        draw(result, args.plot)
    print(json.dumps(result))
    return 0


def _run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from pyalpaca.bench.kernels.device import open_device
    from pyalpaca.bench.kernels.limits import measure_limits
    from pyalpaca.bench.kernels.measure import measure, skipped
    from pyalpaca.bench.kernels.result import result_of
    from pyalpaca.bench.machine import machine

    plan = make_plan(args)
    name = args.device or _device()
    _require(name)
    for peer, modules in skipped(plan.operators, plan.peers, name):
        print(f"{peer.name}: left out, {' and '.join(modules)} not installed; `pip install 'pyalpaca[dev]'`", file=sys.stderr)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        small = 16 << 20
        device = open_device(name, small if args.quick else None)
        limits = measure_limits(device, *((small, 0.02) if args.quick else ()))
        rows = measure(plan, device, limits)
        return result_of(machine(), name, limits, rows, quick=args.quick)
    finally:
        torch.set_num_threads(before)


def make_plan(args: argparse.Namespace) -> Plan:
    """What the flags ask for; ValueError that lists what is known for a name that is not."""
    from pyalpaca.bench.kernels.measure import Plan
    from pyalpaca.bench.kernels.operator import DIRECTIONS
    from pyalpaca.bench.kernels.records import OPERATORS
    from pyalpaca.bench.kernels.timing import Budget

    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads}: expected at least 1")
    if args.seconds <= 0:
        raise ValueError(f"--seconds {args.seconds:g}: expected more than 0")
    operators = [OPERATORS[name] for name in _known("--op", args.op, OPERATORS)]
    dtypes = _known("--dtype", args.dtype, dict.fromkeys(dtype for op in operators for dtype in op.dtypes))
    directions = _known("--direction", args.direction, [d for d in DIRECTIONS if any(d in op.directions for op in operators)])
    peers = dict.fromkeys(peer.name for op in operators for peer in op.peers)
    asked = ["small"] if args.quick and args.shapes is None else args.shapes
    labels = dict.fromkeys(label for op in operators for label in op.shapes)
    if asked == []:
        raise ValueError(f"--shapes is empty; choose from {', '.join(labels)}, or what they begin with")
    for text in asked or []:
        if not any(_begins(label, text) for label in labels):
            raise ValueError(f"--shapes {text}: not known; choose from {', '.join(labels)}, or what they begin with")
    shapes = {
        op.name: tuple(
            label
            for label in op.shapes
            if any(text == label or (label not in op.on_request and _begins(label, text)) for text in (asked or [""]))
        )
        for op in operators
    }
    return Plan(
        tuple(operators),
        tuple(dtypes),
        tuple(directions),
        shapes,
        tuple(_peers(args.peers, peers, quick=args.quick)),
        Budget(0.02, 2) if args.quick else Budget(args.seconds),
        sparing=args.peers is None,
    )


def _peers(asked: Sequence[str] | None, known: Iterable[str], *, quick: bool) -> list[str]:
    if asked == ["none"]:
        return []
    if asked is None and quick:
        return [name for name in known if name != "compile"]
    return _known("--peers", asked, [*known])


def _known(flag: str, asked: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """What is asked for in the order in which it is known; everything for None."""
    names = list(known)
    if asked is None:
        return names
    for name in asked:
        if name not in names:
            raise ValueError(f"{flag} {name}: not known; choose from {', '.join(names)}")
    if not asked:
        raise ValueError(f"{flag} is empty; choose from {', '.join(names)}")
    return [name for name in names if name in asked]


def _begins(label: str, text: str) -> bool:
    return text in ("", label) or label.startswith(text + "/")


def _device() -> str:
    from pyalpaca.ops import npu

    return "npu" if npu.problem() is None else "cpu"


def _require(device: str) -> None:
    """ValueError where the operators of the house would not run at all: plain torch beside itself tells nothing."""
    from pyalpaca.ops import extension, npu

    problem = npu.problem() if device == "npu" else extension.problem()
    if problem is not None:
        raise ValueError(f"--device {device}: {problem}")


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _dump(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=1) + "\n"


def _write(path: Path, text: str) -> None:
    from pyalpaca.files import atomic_file

    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
