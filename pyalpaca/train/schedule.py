"""Scalars that change from step to step: learning rate and fp16 loss scale, as pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pyalpaca.train.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of optimizer step `step` (the first is 1): linear warmup, then cosine, linear or no decay to min_lr."""
    warmup, end = config.warmup, config.decay_steps
    if step <= warmup:
        return config.lr * step / warmup
    if config.lr_schedule == "constant":
        return config.lr
    share = min((step - warmup) / max(end - warmup, 1), 1.0)
    keep = 0.5 * (1 + math.cos(math.pi * share)) if config.lr_schedule == "cosine" else 1 - share
    return config.min_lr + (config.lr - config.min_lr) * keep


@dataclass(frozen=True)
class LossScale:
    """The dynamic loss scale of fp16: the value, clean steps since the last change, overflows left before it halves."""

    value: float = 1.0
    clean: int = 0
    tracker: int = 2


def next_loss_scale(scale: LossScale, overflow: bool, config: TrainConfig) -> LossScale:
    """Halve when `hysteresis` overflows have used the tracker up and on each further one; double after `window` clean steps."""
    if overflow:
        tracker = max(scale.tracker - 1, 0)
        value = max(scale.value / 2, config.min_loss_scale) if tracker == 0 else scale.value
        return LossScale(value, 0, tracker)
    if scale.clean + 1 >= config.loss_scale_window:
        return LossScale(scale.value * 2, 0, config.hysteresis)
    return replace(scale, clean=scale.clean + 1)
