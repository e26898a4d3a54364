"""`pyalpaca report RUN_A RUN_B`: two runs on the same data, step by step: losses, relative error, and a picture of both."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

BAR = 0.02
"""The published bar: the relative error of the loss stays below it at every step."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="pyalpaca report",
        description="Compare the losses of two runs step by step (relative error below 0.02 throughout is the published bar) "
        "and draw both curves and the error.",
        epilog="example: pyalpaca report runs/one-process runs/tp2-pp2 --output loss.png",
    )
    p.add_argument("run_a", help="the run taken as the reference: its folder or its metrics.jsonl")
    p.add_argument("run_b", help="the run compared with it")
    p.add_argument("--output", default="report.png", metavar="PNG", help="the picture (default report.png)")
    p.add_argument("--bar", type=float, default=BAR, metavar="X", help=f"largest relative error that passes (default {BAR})")
    return p


def read_losses(run: str | Path) -> dict[int, float]:
    """{step: loss} of a run folder or a metrics.jsonl. ValueError naming the line that is not a record of a step."""
    path = Path(run)
    if path.is_dir():
        path = path / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; give the --output folder of a training run, which holds metrics.jsonl")
    losses = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
            losses[int(record["step"])] = float(record["loss"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            raise ValueError(f'{path}: line {number} is no record of a step, expected JSON with "step" and "loss"') from None
    if not losses:
        raise ValueError(f"{path}: holds no steps yet; wait until the run has logged one")
    return losses


def compare(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
    """{step: |b - a| / |a|} of the steps that both runs have; infinite where a loss is not. ValueError if there are none."""
    steps = sorted(a.keys() & b.keys())
    if not steps:
        raise ValueError(f"the runs share no step: one has {min(a)} to {max(a)}, the other {min(b)} to {max(b)}")

    def error(x: float, y: float) -> float:
        return abs(y - x) / max(abs(x), 1e-12) if math.isfinite(x) and math.isfinite(y) else math.inf

    return {step: error(a[step], b[step]) for step in steps}


def draw(
    a: dict[int, float], b: dict[int, float], errors: dict[int, float], names: tuple[str, str], bar: float, out: Path
) -> None:
    """Both losses above, the relative error and the bar below."""
    from matplotlib.figure import Figure

    from pyalpaca.files import atomic_file

    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    top.plot(list(a), list(a.values()), color="#1f77b4", linewidth=2.5, alpha=0.6, label=names[0])
    top.plot(list(b), list(b.values()), color="#d62728", linewidth=1.2, linestyle="--", label=names[1])
    top.set_ylabel("lm loss")
    top.legend()
    top.grid(alpha=0.3)
    # A logarithm has no place for zero: equal losses are drawn at the resolution of fp32.
    bottom.semilogy(list(errors), [max(e, 1e-8) for e in errors.values()], color="#2ca02c", label="relative error")
    bottom.axhline(bar, color="black", linewidth=1, linestyle=":", label=f"bar {bar:g}")
    bottom.set_ylabel("relative error")
    bottom.set_xlabel("step")
    bottom.legend()
    bottom.grid(alpha=0.3)
    figure.suptitle(f"Loss accuracy: largest relative error {max(errors.values()):.2e}")
    with atomic_file(out) as partial:
        figure.savefig(partial, format="png", dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison, draw it; exit status 1 if the error passes the bar. The last line is one JSON object."""
    args = parser().parse_args(argv)
    a, b = read_losses(args.run_a), read_losses(args.run_b)
    errors = compare(a, b)
    worst = max(errors, key=lambda step: errors[step])
    try:
        draw(a, b, errors, (args.run_a, args.run_b), args.bar, Path(args.output))
    except ModuleNotFoundError as missing:
        raise ValueError(f"drawing needs {missing.name}: pip install 'pyalpaca[plot]'") from None
    passed = errors[worst] < args.bar
    print(f"{'step':>6}  {'loss A':>10}  {'loss B':>10}  {'rel. error':>10}")
    shown = sorted({*list(errors)[:: max(len(errors) // 10, 1)], worst, max(errors)})
    for step in shown:
        print(f"{step:>6}  {a[step]:>10.6f}  {b[step]:>10.6f}  {errors[step]:>10.2e}{'  <- largest' if step == worst else ''}")
    print(f"{len(errors)} steps, largest relative error {errors[worst]:.2e}: {'below' if passed else 'NOT below'} {args.bar:g}")
    print(f"picture: {args.output}")
    # JSON has no infinity: a loss that is not finite leaves no error to give.
    largest = errors[worst] if math.isfinite(errors[worst]) else None
    print(json.dumps({"steps": len(errors), "max_relative_error": largest, "worst_step": worst, "passed": passed}))
    return 0 if passed else 1
