"""`pyalpaca bench convert`: merging and converting beside `cp` of the same bytes and beside peft, with the memory taken."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyalpaca.bench import disk
from pyalpaca.bench.convert.cases import CASES, PEERS, Settings
from pyalpaca.bench.convert.measure import measure_cases, measure_halved, measure_peft, workspace
from pyalpaca.bench.convert.model import ALPACA_ROWS, BASE_ROWS, SCALES, parse_scale
from pyalpaca.bench.convert.page import page, table
from pyalpaca.bench.machine import limits, machine, rounded
from pyalpaca.bench.means import geometric_means


def run(settings: Settings) -> dict[str, Any]:
    """Make the models, measure, and return the JSON object of docs/architecture.md, "The last line"."""
    load = round(os.getloadavg()[0], 2)
    with workspace(settings):
        rows = measure_cases(settings)
        if settings.halved:
            measure_halved(settings, rows)
        if "peft" in settings.peers:
            rows.append(measure_peft(settings))
        rates = dict(limits())
        for peer in ("cp", "plain_cp"):
            speeds = [row["written_bytes"] / statistics.median(row["timings"][peer]) for row in rows if peer in row["timings"]]
            if speeds:
                rates[f"{peer}_bytes"] = rounded(statistics.median(speeds))
        for row in rows:
            if row.get("arithmetic_flops"):
                row["arithmetic_seconds"] = rounded(row["arithmetic_flops"] / rates["sgemm_flops"])
        return {
            "bench": "convert",
            "machine": {**machine(), "filesystem": disk.filesystem(settings.work)},
            "settings": {
                "scale": asdict(settings.scale),
                "peft_scale": asdict(settings.peft_scale),
                "repeats": settings.repeats,
                "cache": settings.cache,
                "load_before": load,
                "largest_tensor_bytes": 2 * ALPACA_ROWS * settings.scale.hidden_size,
            },
            "limits": rates,
            "rows": rows,
            "geomean": geometric_means(rows),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; raises ValueError or OSError, one sentence, for what can't be measured here."""
    parser = argparse.ArgumentParser(
        prog="pyalpaca bench convert",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Merge and convert a synthetic LLaMA, beside `cp` of the same bytes and beside peft, in one run; prints\n"
        "seconds, GB/s, the ratio to cp and the memory taken. The last line on stdout is one JSON object.\n\ncases:\n"
        + "\n".join(f"  {name:<15} {case.text}" for name, case in CASES.items()),
        epilog="example: pyalpaca bench convert --scale small --cases merge-hf --peers cp --json convert.json",
    )
    add = parser.add_argument
    names = ", ".join(SCALES)
    add(
        "--scale",
        default="7b",
        help=f"{names}, or a fraction of the 7B's layers such as 0.25 (default: 7b, 60 GB of disk)",
    )
    add("--work-dir", type=Path, default=Path("bench-convert"), metavar="DIR", help="where to write (default: bench-convert)")
    add("--cases", type=_names, default=list(CASES), metavar="A,B", help="the cases to run (default: all)")
    add("--peers", type=_names, metavar="A,B", help="cp, peft (default: cp, and peft where it is installed)")
    add("--peft-scale", metavar="SCALE", help="of the model merged beside peft, which holds it in memory (default: at most 1b)")
    add("--repeats", type=int, default=3, metavar="N", help="rounds that count, after one that does not (default: 3)")
    add("--cache", choices=("warm", "cold"), default="warm", help="the sources in the page cache or not (default: warm)")
    add("--no-half", dest="halved", action="store_false", help="leave out the runs with half the layers, for the memory")
    add("--keep", action="store_true", help="leave the synthetic models in --work-dir for the next run")
    add("--json", type=Path, metavar="FILE", help="also write the JSON object to a file")
    add("--markdown", type=Path, metavar="FILE", help="also write a page with the results and how they were measured")
    add("--from", type=Path, dest="earlier", metavar="FILE", help="print what an earlier --json holds instead of measuring")
    args = parser.parse_args(argv)

    result = read_result(args.earlier) if args.earlier else run(parse_settings(args))
    print(table(result))
    for path, text in ((args.json, json.dumps(result, indent=1) + "\n"), (args.markdown, page(result))):
        if path is not None:
            write(path, text)
    print(json.dumps(result))
    return 0


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_settings(args: argparse.Namespace) -> Settings:
    """Settings of the flags; ValueError for what is unknown or not installed."""
    scale = parse_scale(args.scale)
    smaller = min(scale, SCALES["1b"], key=lambda s: s.parameters(BASE_ROWS))
    missing = [name for name in ("peft", "transformers") if find_spec(name) is None]
    peers = args.peers if args.peers is not None else ["cp", *([] if missing else ["peft"])]
    for flag, given, known in (("--cases", args.cases, list(CASES)), ("--peers", peers, list(PEERS))):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"{flag} {unknown[0]}: not known; choose from {', '.join(known)}")
    if not args.cases:
        raise ValueError(f"--cases is empty; choose from {', '.join(CASES)}")
    if "cp" in peers and shutil.which("cp") is None:
        raise ValueError("--peers cp: there is no cp on this machine; leave it out")
    if "peft" in peers and missing:
        raise ValueError(f"--peers peft: {' and '.join(missing)} not installed; `pip install 'pyalpaca[dev]'` or leave it out")
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: expected at least 1")
    peft_scale = parse_scale(args.peft_scale) if args.peft_scale else smaller
    return Settings(
        scale, peft_scale, args.work_dir, tuple(args.cases), tuple(peers), args.repeats, args.cache, args.halved, args.keep
    )


def read_result(path: Path) -> dict[str, Any]:
    """The JSON object of an earlier run; ValueError if the file holds none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        result = None
    if not isinstance(result, dict) or result.get("bench") != "convert":
        raise ValueError(f"{path}: is not the result of this benchmark; give a file that --json wrote")
    return result


def write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    from pyalpaca.files import atomic_file

    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
