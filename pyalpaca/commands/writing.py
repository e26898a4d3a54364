"""What the command lines that write a model share: their flags, and carrying out a plan or only saying it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyalpaca.checkpoint import Plan

CONTAINERS = ("torch2.7", "torch2.1", "torch1.13")


def adapter_list(text: str) -> list[str]:
    """The adapter folders of `A,B` or `A, B`, in order."""
    return [part.strip() for part in text.split(",") if part.strip()]


def add_writing(parser: argparse.ArgumentParser) -> None:
    """The flags --dry-run and --container."""
    parser.add_argument("--dry-run", action="store_true", help="check all, say what would be written and needed, write nothing")
    parser.add_argument(
        "--container",
        choices=CONTAINERS,
        default=CONTAINERS[0],
        help=".pth, .bin and .pt files byte for byte as torch.save of 2.7 to 2.13 (default), 2.1 to 2.6, or 1.13 and 2.0 "
        "writes them: the published hashes are of files from 1.13",
    )


def carry_out(plan: Plan, out: str | Path, dry_run: bool, done: str) -> int:
    """Write what is planned to `out` and say `done`, or only say the plan; the exit status."""
    from pyalpaca.checkpoint import describe, execute

    if dry_run:
        print(describe(plan, out))
        print("nothing was written (--dry-run)")
        return 0
    execute(plan, out)
    print(f"{done}: {out} ({plan.layout}, vocabulary {plan.reader.config.vocab_size})")
    return 0
