"""`pyalpaca bench`: the benchmarks by name, each loaded only when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

# name, module with main(argv), one line of help
_BENCHMARKS = (
    ("convert", "pyalpaca.bench.convert.run", "merging and converting beside cp and peft: seconds, memory"),
    ("kernels", "pyalpaca.bench.kernels.run", "each operator beside the machine's limits and its peers: time, memory"),
    ("train", "pyalpaca.bench.train.run", "training steps beside transformers: tokens/s, share of the peak, memory"),
    ("ascend", "pyalpaca.bench.ascend.run", "the kernels for NPUs on a modelled timeline: no NPU needed, none measured"),
)


def _help() -> str:
    return "\n".join(
        [
            "usage: pyalpaca bench NAME [options]        pyalpaca bench NAME --help says more",
            "",
            "Measure on this machine, beside peers in the same run. Prints a table; the last line is one JSON object.",
            "",
            *(f"  {name:<12}{text}" for name, _, text in _BENCHMARKS),
            "",
            "example: pyalpaca bench convert --scale small",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that `argv` names. ValueError for a name that is none."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    modules = {name: module for name, module, _ in _BENCHMARKS}
    if arguments[0] not in modules:
        raise ValueError(f"there is no benchmark `{arguments[0]}`: choose from {', '.join(modules)}")
    return int(import_module(modules[arguments[0]]).main(arguments[1:]) or 0)
