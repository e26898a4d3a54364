"""DeepSpeed's JSON and pyalpaca's settings as one: what both say must agree, what the file leaves open is filled in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyalpaca.train.config import TrainConfig

_OWN = (
    "scheduler",
    "data_efficiency",
    "curriculum_learning",
    "compression_training",
    "autotuning",
    "pipeline",
    "tensor_parallel",
)
"""Sections that would do what is pyalpaca's to do."""


def deepspeed_config(config: TrainConfig, data_parallel: int) -> dict[str, Any]:
    """The file that `deepspeed_config` names, ready for deepspeed.initialize, for that many data-parallel ranks.

    "auto" leaves a value to pyalpaca's settings, as a missing one does. ValueError where file and settings contradict each other
    or the file asks for something else than ZeRO-1, -2 or -3; FileNotFoundError if there is no such file.
    """
    path = Path(config.deepspeed_config)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found, expected a JSON file for DeepSpeed; check --deepspeed-config")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    if not isinstance(result, dict):
        raise ValueError(f"{path}: holds {type(result).__name__}, expected an object with DeepSpeed's settings")
    for section in _OWN:
        if result.get(section):
            raise ValueError(f"{path}: has a section {section!r}, which is pyalpaca's to decide; remove it")
    stage = _section(path, result, "zero_optimization").get("stage")
    if stage not in (1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage is {stage!r}, expected 1, 2 or 3; --engine native trains without ZeRO")
    samples = config.micro_batch_size * data_parallel
    _agree(
        path,
        result,
        "",
        {
            "train_batch_size": config.global_batch_size,
            "train_micro_batch_size_per_gpu": config.micro_batch_size,
            "gradient_accumulation_steps": config.global_batch_size // samples,
            "gradient_clipping": config.clip,
        },
    )
    for section, dtype in (("fp16", "fp16"), ("bf16", "bf16")):
        values = _section(path, result, section)
        _agree(path, values, f"{section}.", {"enabled": config.dtype == dtype})
        if section == "fp16" and values["enabled"]:
            _agree(path, values, "fp16.", _loss_scale(config))
            # pyalpaca sets the scale of each step itself: DeepSpeed doubles its own one step late and gives up at the smallest.
            values = {"enabled": True, "loss_scale": config.min_loss_scale}
        result[section] = values
    _check_optimizer(path, _section(path, result, "optimizer"), config)
    result.pop("optimizer", None)
    return result


def _loss_scale(config: TrainConfig) -> dict[str, float]:
    return {
        "loss_scale": 0,  # dynamic
        "initial_scale_power": math.log2(config.loss_scale),
        "loss_scale_window": config.loss_scale_window,
        "hysteresis": config.hysteresis,
        "min_loss_scale": config.min_loss_scale,
        "consecutive_hysteresis": False,
    }


def _check_optimizer(path: Path, section: Mapping[str, Any], config: TrainConfig) -> None:
    """Adam, which is AdamW to DeepSpeed, is what pyalpaca brings; its settings may be said again."""
    if section.get("type", "AdamW") not in ("Adam", "AdamW"):
        raise ValueError(f"{path}: optimizer.type is {section['type']!r}, expected AdamW; remove the section")
    given = dict(_section(path, section, "params"))
    ours = {
        "lr": config.lr,
        "betas": [config.beta1, config.beta2],
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "adam_w_mode": True,
        "torch_adam": given.get("torch_adam"),
    }
    if unknown := sorted(set(given) - set(ours)):
        raise ValueError(f"{path}: optimizer.params has {unknown[0]!r}, expected only {', '.join(ours)}; remove it")
    _agree(path, given, "optimizer.params.", ours)


def _section(path: Path, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"{path}: {name} is {section!r}, expected an object")
    return section


def _agree(path: Path, values: dict[str, Any], where: str, ours: Mapping[str, Any]) -> None:
    """Fill in what `values` leaves open; ValueError for what differs."""
    for key, value in ours.items():
        found = values.get(key, "auto")
        if found != "auto" and found != value:
            flag = _FLAGS.get(key, key).replace("_", "-")
            raise ValueError(
                f"{path}: {where}{key} is {json.dumps(found)}, but the run's settings make it {json.dumps(value)}; "
                f'change one of them (--{flag}), or write "auto" here'
            )
        values[key] = value


_FLAGS = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "gradient_clipping": "clip",
    "enabled": "dtype",
    "initial_scale_power": "loss_scale",
    "betas": "beta1",
}
"""Which setting a key of the file is known by here, where the names differ."""
