"""The `pyalpaca` command: a table of sub-commands, each loaded only when it is asked for, and one way to report errors."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module

from pyalpaca import __version__
from pyalpaca.files import PARTIAL

# A waiting OpenMP thread spins for milliseconds by default; where other programs want its core, a training step then takes
# ten times as long. Spinning for some microseconds costs nothing on an idle machine. Read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# name, module with main(argv), one line of help. Grouped as a person walks the road.
_COMMANDS = (
    (
        "First steps",
        "demo",
        "pyalpaca.demo.road",
        "walk the whole road on a small model: convert, merge, fine-tune, compare, generate",
    ),
    (
        "First steps",
        "doctor",
        "pyalpaca.doctor",
        "say what was found: torch, devices, compiler, which backend serves which operator",
    ),
    ("Weights", "convert", "pyalpaca.commands.convert", "any checkpoint layout to any other"),
    ("Weights", "merge", "pyalpaca.commands.merge", "merge LoRA adapters into a base model"),
    ("Weights", "extract", "pyalpaca.commands.extract", "a LoRA adapter out of a run or of the difference to a base"),
    ("Weights", "digest", "pyalpaca.commands.digest", "one content digest for the same weights in every layout"),
    ("Weights", "verify", "pyalpaca.commands.verify", "files against the published sha256"),
    ("Weights", "diff", "pyalpaca.commands.diff", "how far apart two checkpoints are, tensor by tensor"),
    ("Text", "preprocess", "pyalpaca.commands.preprocess_data", "instruction or plain text to an indexed data set"),
    ("Text", "merge-tokenizers", "pyalpaca.commands.merge_tokenizers", "extend a SentencePiece vocabulary by another"),
    (
        "Training",
        "plan",
        "pyalpaca.commands.plan",
        "memory, traffic and time of a training before it runs",
    ),
    ("Training", "train", "pyalpaca.train.run", "fine-tune on one or many devices (under torchrun)"),
    ("Training", "report", "pyalpaca.report", "draw and sum up runs; compare their losses step by step"),
    ("Measuring", "bench", "pyalpaca.commands.bench", "benchmarks, beside their peers and this machine's limits"),
    ("Talking", "generate", "pyalpaca.generate.run", "answer prompts with a model in any layout"),
)


def _help() -> str:
    lines = [
        f"pyalpaca {__version__}: LLaMA and Chinese-LLaMA-Alpaca on Ascend NPUs and on any CPU.",
        "",
        "usage: pyalpaca COMMAND [options]        pyalpaca COMMAND --help says more",
    ]
    group = ""
    for where, name, _, text in _COMMANDS:
        if where != group:
            lines += ["", f"{where}:"]
            group = where
        lines.append(f"  {name:<18}{text}")
    lines += [
        "",
        "Start with `pyalpaca demo`. On several devices: torchrun --nproc_per_node 8 -m pyalpaca.train --tp 4 --pp 2 ...",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that `argv` names; the exit status is the result."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"pyalpaca {__version__}")
        return 0
    modules = {name: module for _, name, module, _ in _COMMANDS}
    name = arguments[0]
    if name not in modules:
        from difflib import get_close_matches

        near = get_close_matches(name, modules, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "`pyalpaca --help` lists the commands"
        raise ValueError(f"there is no command `{name}`: {hint}")
    sys.argv[0] = f"pyalpaca {name}"
    return int(import_module(modules[name]).main(arguments[1:]) or 0)


def _sentence(error: Exception) -> str:
    """What to print of an error. The operating system's own name no remedy, and perhaps a name that nobody typed."""
    if isinstance(error, OSError) and error.filename is not None:
        path = str(error.filename).removesuffix(PARTIAL)
        return f"{path}: {error.strerror}; check that the path exists, may be read and written, and has space left"
    return str(error)


def run(command: Callable[[], int | None]) -> None:
    """Run a command's main and exit: 0 when done, 2 with one sentence for bad input or a diverged training, 130 when interrupted.

    PYALPACA_TRACEBACK=1 shows where an error came from.
    """
    try:
        status = command() or 0
    except BrokenPipeError:
        # Whoever read our output has enough of it (`pyalpaca digest --tensors | head`); Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("PYALPACA_TRACEBACK"):
            raise
        if os.environ.get("RANK", "0") != "0":
            # Bad input is the same on every rank: rank 0 says it, and torchrun ends the others while they wait here. What
            # only this rank has found is said after all.
            time.sleep(3)
        print(f"error: {_sentence(error)}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def entry() -> None:
    """What the installed `pyalpaca` script calls."""
    run(main)


if __name__ == "__main__":
    entry()
