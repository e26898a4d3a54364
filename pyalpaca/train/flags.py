"""The command line of training: defaults, then a TOML file, then flags, all from the fields of TrainConfig.

No torch here either. What is not a setting is one sentence with the nearest name.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from pyalpaca.train.config import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_EPILOG = """\
example:
  torchrun --nproc_per_node 4 -m pyalpaca.train --config recipe.toml --model merged --data data/alpaca --output runs/a --tp 2

what a run leaves in OUTPUT:
  step_XXXXXXX, best   checkpoints, weights and optimizer; every command takes OUTPUT (its newest) or one of them as a model
  metrics.jsonl        a record of every step; train.json: the settings
  pyalpaca report runs/a [runs/b ...]                        draw and compare runs
  pyalpaca convert runs/a out --to hf                        the model as a Hugging Face folder (or meta, megatron, gguf)
  pyalpaca extract runs/a adapter                            the LoRA adapter in PEFT's format
"""


class _Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is one sentence, without a screen of usage before it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the flags")


def parser() -> argparse.ArgumentParser:
    """The command line of training: --config FILE and one flag for each field of TrainConfig."""
    result = _Parser(
        prog="pyalpaca train",
        description="Fine-tune a LLaMA model on an instruction data set, on one process or many (torchrun).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("--config", metavar="TOML", help="file of settings; flags given beside it win")
    for f in dataclasses.fields(TrainConfig):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        shown = "" if f.default in ("", 0, False) else f" (default {f.default})"
        if f.default is True or f.default is False:
            result.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            metavar = None if f.metadata["choices"] else {int: "N", float: "X", str: "TEXT"}[type(f.default)]
            kind = type(f.default)
            result.add_argument(flag, type=kind, default=None, metavar=metavar, choices=f.metadata["choices"], help=text + shown)
    return result


def read_toml(path: str | Path) -> dict[str, Any]:
    """The settings of a TOML file; tables only group them. ValueError for what is not a setting or has another type."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: not found, expected a TOML file of settings; check --config")
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not TOML ({error})") from None
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(value if isinstance(value, Mapping) else {key: value})
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for key, value in flat.items():
        if key not in fields:
            near = get_close_matches(key, fields, n=1)
            raise ValueError(f"{path}: there is no setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        kind = type(fields[key].default)
        if kind is float and type(value) is int:
            flat[key] = float(value)
        elif type(value) is not kind:
            raise ValueError(f"{path}: {key} is {value!r}, expected a value of type {kind.__name__}")
    return flat


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """TrainConfig from a command line: defaults, then the TOML file, then flags. ValueError for what is not a setting."""
    known = parser()
    values, unknown = known.parse_known_args(argv)
    if unknown:
        flags = ["--config", *("--" + f.name.replace("_", "-") for f in dataclasses.fields(TrainConfig))]
        near = get_close_matches(unknown[0].split("=")[0], flags, n=1)
        raise ValueError(f"there is no flag {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; --help lists them"))
    given = {key: value for key, value in vars(values).items() if value is not None and key != "config"}
    written = read_toml(values.config) if values.config else {}
    for source in (written, given):
        if source.get("steps") and source.get("epochs"):
            raise ValueError("steps and epochs both say how long to train; give one of them")
    if "steps" in given or "epochs" in given:
        written = {key: value for key, value in written.items() if key not in ("steps", "epochs")}
    config = TrainConfig(**{**written, **given})
    for name in ("model", "data", "output"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is missing: {TrainConfig.__dataclass_fields__[name].metadata['help']}")
    return config
