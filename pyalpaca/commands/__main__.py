"""`python -m pyalpaca.commands NAME ...`: the scripts of tools/ by their own names, where only the package is installed."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from pyalpaca.cli import run


def main() -> int:
    """Run the command that the first argument names. ValueError for a name that is none."""
    names = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_"))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        raise ValueError(f"give one of these and its flags: {', '.join(names)}")
    return int(import_module(f"pyalpaca.commands.{sys.argv[1]}").main(sys.argv[2:]) or 0)


run(main)
