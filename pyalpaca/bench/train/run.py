"""The command: settings of the flags, the measurement, and the results in print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyalpaca.bench.machine import cores, machine
from pyalpaca.bench.means import geometric_means
from pyalpaca.bench.train.cases import CONTESTANTS, DEFAULT, SCALES
from pyalpaca.files import atomic_file


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; ValueError, one sentence, for what can't be measured here."""
    parser = argparse.ArgumentParser(
        prog="pyalpaca bench train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train the same model on the same tokens with pyalpaca and with transformers, by turns, each in a process\n"
        "of its own; prints tokens/s, the share of the machine's fp32 matrix products, and peak memory. The last line is one\n"
        "JSON object.\n\n"
        "contestants:\n" + "\n".join(f"  {name:<22} {who.text}" for name, who in CONTESTANTS.items()),
        epilog="example: pyalpaca bench train --contestants ours,transformers --rounds 2",
    )
    add = parser.add_argument
    add("--scale", choices=SCALES, default="97m", help="97m; wide: the vocabulary 49954 and 2048 tokens (default: 97m)")
    add("--contestants", metavar="A,B", help=f"who trains (default: {','.join(DEFAULT)})")
    add("--steps", type=int, default=2, metavar="N", help="steps at each turn (default: 2)")
    add("--rounds", type=int, default=3, metavar="N", help="turns of each (default: 3)")
    add(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="threads of a contestant, over its processes (default: all cores)",
    )
    add("--json", type=Path, metavar="FILE", help="also write the JSON object to a file")
    add("--markdown", type=Path, metavar="FILE", help="also write a page with the results")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.contestants.split(",") if name.strip()] if args.contestants else list(DEFAULT)
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown or not names:
        raise ValueError(f"--contestants {''.join(unknown[:1])}: not known; choose from {', '.join(CONTESTANTS)}")
    if find_spec("transformers") is None:
        if args.contestants and any(CONTESTANTS[name].module == "peer" for name in names):
            raise ValueError("--contestants: transformers is not installed; `pip install 'pyalpaca[dev]'` or leave it out")
        names = [name for name in names if CONTESTANTS[name].module != "peer"]
    for flag in ("steps", "rounds"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected at least 1")
    threads = args.threads or cores() or 1

    from pyalpaca.bench.train.measure import measure

    scale = SCALES[args.scale]
    rows, rates = measure(names, scale, args.steps, args.rounds, threads)
    result = {
        "bench": "train",
        "machine": {**machine(), "threads": threads},
        "settings": {"scale": asdict(scale), "steps": args.steps, "rounds": args.rounds},
        "limits": rates,
        "rows": rows,
        "geomean": geometric_means(rows),
    }
    print(table(result))
    for path, text in ((args.json, json.dumps(result, indent=1) + "\n"), (args.markdown, page(result))):
        if path is not None:
            with atomic_file(path) as partial:
                partial.write_text(text, encoding="utf-8")
    print(json.dumps(result))
    return 0


def table(result: Mapping[str, Any]) -> str:
    """The rows as a Markdown table; ratios are those to the reference of the row's group."""
    heads = ("contestant", "s/step", "tokens/s", "MFU", "x ours in time", "memory", "x ours in memory")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    times = {name: ratio for row in result["rows"] for name, ratio in row["vs"].items()}
    sizes = {name: ratio for row in result["rows"] for name, ratio in row["memory_vs"].items()}
    for row in result["rows"]:
        name = row["name"].split("/")[0]
        time, size = (f"{ratios[name]:.2f}" if name in ratios else "1" for ratios in (times, sizes))
        lines.append(
            f"| {name} | {row['seconds']:.3f} | {row['tokens_per_second']:.0f} | {row['limit_share']:.1%} | {time} | "
            f"{row['peak_bytes'] / 1e9:.2f} GB | {size} |"
        )
    return "\n".join(lines)


def page(result: Mapping[str, Any]) -> str:
    """The whole page: what was measured, on what, and the table."""
    where, scale = result["machine"], result["settings"]["scale"]
    shape = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in scale.items() if key != "name")
    names = [row["name"].split("/")[0] for row in result["rows"]]
    parts = [
        "# Training steps",
        f"`pyalpaca bench train --scale {scale['name']}` on {where['cpu']}, {where['threads']} threads, torch {where['torch']}, "
        f"commit {where['commit']}, {where['date']}. The model: {shape}. fp32 matrix products of 2048 x 2048 reach "
        f"{result['limits']['sgemm_flops'] / 1e9:.0f} GFLOP/s, copying {result['limits']['copy_bytes'] / 1e9:.1f} GB/s.",
        "A step is forward, backward, clipping and AdamW. Everyone starts from the same weights, sees the same tokens and lives "
        "in a process of its own (layouts: in two, with a thread each); they train by turns, and the medians are compared. The "
        "share of sgemm is the MFU that training logs, held against these matrix products. "
        "Memory is the most that the processes held (VmHWM), libraries included.",
        table(result),
        "\n".join(f"- {name}: {CONTESTANTS[name].text}" for name in names),
    ]
    return "\n\n".join(parts) + "\n"
