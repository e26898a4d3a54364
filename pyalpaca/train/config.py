"""The settings of a training run: one frozen record, filled from a TOML file and from flags, checked before anything is loaded.

No torch here, so that `pyalpaca train --help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_AT_LEAST_ONE = (
    *("tp", "pp", "micro_batch_size", "global_batch_size", "seq_length", "steps"),
    *("keep", "log_every", "hysteresis", "loss_scale_window"),
)


def _setting(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. ValueError for settings that contradict each other."""

    model: str = _setting("", "model to start from: a folder in any layout (Hugging Face, Meta, Megatron, native)")
    lora: str = _setting("", "adapters merged into the model on the way, in order: A,B")
    data: str = _setting("", "prefix of the indexed data set that preprocess_data.py wrote")
    data_type: str = _setting("instruction", "one sample a record, or text cut to seq_length", ("instruction", "text"))
    output: str = _setting("", "folder of the run: metrics.jsonl, checkpoints")
    vocab_size: int = _setting(0, "real vocabulary of a Megatron folder without config.json (0: the folder says)")

    tp: int = _setting(1, "tensor-parallel size")
    pp: int = _setting(1, "pipeline-parallel size; what tp x pp leaves of the processes is data parallel")
    micro_batch_size: int = _setting(2, "samples in one forward pass of one device")
    global_batch_size: int = _setting(16, "samples in one step, over all devices and accumulated micro-batches")
    seq_length: int = _setting(512, "longest sample in tokens; longer ones are cut")
    pad_to: int = _setting(0, "pad to a multiple of this many tokens instead of to seq_length (0: to seq_length)")
    split: str = _setting("1,0,0", "shares of the data for training, validation, test; the first is trained on")

    steps: int = _setting(100, "optimizer steps")
    lr: float = _setting(1e-4, "highest learning rate")
    min_lr: float = _setting(0.0, "learning rate at the end of the decay")
    lr_schedule: str = _setting("cosine", "decay after the warmup", ("cosine", "linear", "constant"))
    lr_decay_steps: int = _setting(0, "step at which min_lr is reached (0: the last)")
    warmup_steps: int = _setting(0, "steps of linear warmup")
    warmup_fraction: float = _setting(0.0, "the same as a share of the decay steps")
    weight_decay: float = _setting(0.01, "AdamW's decoupled weight decay")
    decay_norms: bool = _setting(False, "decay RMSNorm weights too, as the original does")
    beta1: float = _setting(0.9, "AdamW's first momentum")
    beta2: float = _setting(0.999, "AdamW's second momentum")
    eps: float = _setting(1e-8, "AdamW's epsilon")
    clip: float = _setting(1.0, "largest global gradient norm (0: no clipping)")
    seed: int = _setting(42, "of the sample order and of what is initialised")

    dtype: str = _setting("fp32", "of weights and activations; the optimizer keeps fp32 masters", ("fp32", "bf16", "fp16"))
    loss_scale: float = _setting(4096.0, "first loss scale in fp16")
    loss_scale_window: int = _setting(1000, "clean steps after which the loss scale doubles")
    hysteresis: int = _setting(2, "overflows after which the loss scale halves")
    min_loss_scale: float = _setting(1.0, "smallest loss scale")
    recompute: str = _setting("none", "activations computed again in the backward pass", ("none", "full"))
    on_nan: str = _setting(
        "stop", "what a loss or gradient that is not finite does (fp16 skips until the loss scale is smallest)", ("stop", "skip")
    )

    lora_r: int = _setting(0, "train LoRA factors of this rank (0: train all weights)")
    lora_alpha: float = _setting(0.0, "LoRA scale is alpha / r (0: 2 r)")
    lora_targets: str = _setting("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "projections that get LoRA factors")
    lora_full: str = _setting("embed_tokens,lm_head", "modules trained in full beside LoRA")

    log_every: int = _setting(1, "steps between log lines (metrics.jsonl has every step)")
    save_every: int = _setting(0, "steps between checkpoints (0: only at the end)")
    keep: int = _setting(2, "checkpoints kept; older ones are deleted")
    resume: bool = _setting(False, "go on from the newest checkpoint in the output folder, if there is one")
    timeout: float = _setting(30.0, "minutes after which a collective that others don't join ends the run")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{f.name} is {value!r}, expected one of {', '.join(choices)}")
            least = 1 if f.name in _AT_LEAST_ONE else 0
            if not isinstance(value, str) and not value >= least:  # so written, a NaN fails too
                raise ValueError(f"{f.name} is {value}, expected at least {least}")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected less than 1")
        if not 0 < self.min_loss_scale <= self.loss_scale:
            raise ValueError(
                f"min_loss_scale is {self.min_loss_scale}, expected above 0 and at most loss_scale {self.loss_scale}"
            )
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError("warmup_steps and warmup_fraction say the same thing; give one of them")
        if self.lora_alpha and not self.lora_r:
            raise ValueError("lora_alpha is given without lora_r, so all weights would be trained; give lora_r too")

    @property
    def decay_steps(self) -> int:
        return self.lr_decay_steps or self.steps

    @property
    def warmup(self) -> int:
        """Steps of warmup."""
        return self.warmup_steps or round(self.warmup_fraction * self.decay_steps)


def parser() -> argparse.ArgumentParser:
    """The command line of training: --config FILE and one flag for each field of TrainConfig."""
    result = argparse.ArgumentParser(
        prog="pyalpaca train",
        description="Fine-tune a LLaMA model on an instruction data set, on one process or many (torchrun).",
        epilog="example: torchrun --nproc_per_node 4 -m pyalpaca.train --config recipe.toml --model merged --data data/alpaca "
        "--output runs/a --tp 2 --pp 2",
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
    """TrainConfig from a command line: defaults, then the TOML file, then flags."""
    known = parser()
    values, unknown = known.parse_known_args(argv)
    if unknown:
        flags = ["--config", *("--" + f.name.replace("_", "-") for f in dataclasses.fields(TrainConfig))]
        near = get_close_matches(unknown[0].split("=")[0], flags, n=1)
        known.error(f"there is no flag {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; --help lists them"))
    given = {key: value for key, value in vars(values).items() if value is not None and key != "config"}
    config = TrainConfig(**{**(read_toml(values.config) if values.config else {}), **given})
    for name in ("model", "data", "output"):
        if not getattr(config, name):
            known.error(f"--{name} is missing: {TrainConfig.__dataclass_fields__[name].metadata['help']}")
    return config
