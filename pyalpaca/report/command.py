"""`pyalpaca report RUN [RUN ...]`: one run drawn and summed up, or several compared with the first, step by step."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from pyalpaca.files import atomic_file
from pyalpaca.report.compare import BAR, compare
from pyalpaca.report.picture import draw
from pyalpaca.report.runs import read_run
from pyalpaca.report.summary import as_json, summary


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="pyalpaca report",
        description="Draw loss, learning rate, gradient norm, throughput and memory of one run or more, print the row of the "
        "published performance table for each, and compare the losses of the others with the first one's, step by step: a "
        f"relative error below {BAR} throughout is the published bar. Status 1 if a run does not pass it. The last line is one "
        "JSON object.",
        epilog="example: pyalpaca report runs/one-process runs/tp2-pp2 --output loss.png --markdown report.md",
    )
    p.add_argument("run", nargs="+", help="the folder of a run, or its metrics.jsonl; the first is the reference")
    p.add_argument("--output", default="report.png", metavar="PNG", help="the picture (default report.png)")
    p.add_argument("--markdown", metavar="MD", help="also write the summary to this file, the picture shown in it")
    p.add_argument("--bar", type=float, default=BAR, metavar="X", help=f"largest relative error that passes (default {BAR})")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Print the summary, draw the picture; exit status 1 if an error reaches the bar. ValueError for what are no runs."""
    args = parser().parse_args(argv)
    runs = [read_run(run) for run in args.run]
    comparisons = [compare(runs[0], other, args.bar) for other in runs[1:]]
    picture, words = Path(args.output), summary(runs, comparisons)
    draw(runs, comparisons, picture)
    print(f"{words}\n\npicture: {picture}")
    if args.markdown:
        target = Path(args.markdown)
        shown = _seen_from(picture, target.parent)
        with atomic_file(target) as partial:
            partial.write_text(f"# {' and '.join(run.name for run in runs)}\n\n![the runs]({shown})\n\n{words}\n")
        print(f"summary: {target}")
    print(json.dumps(as_json(runs, comparisons)))
    return 0 if all(found.passed for found in comparisons) else 1


def _seen_from(picture: Path, folder: Path) -> str:
    """The picture's path as a file in `folder` may refer to it."""
    picture, folder = picture.absolute(), folder.absolute()
    return str(picture.relative_to(folder)) if picture.is_relative_to(folder) else str(picture)
