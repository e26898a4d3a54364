"""Rotary position tables (Su et al. 2021), with the two frequency rescalings that LLaMA checkpoints use."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyalpaca.model.config import LlamaConfig, rope_type


class Rope(NamedTuple):
    """cos and sin of position x frequency, fp32 (S, head_dim / 2)."""

    cos: Tensor
    sin: Tensor


def frequencies(config: LlamaConfig) -> Tensor:
    """Angle per position of each pair of dimensions, fp32 (head_dim / 2)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inverse = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None or rope_type(scaling) == "default":
        return inverse
    factor = float(scaling["factor"])
    if rope_type(scaling) == "linear":
        return inverse / factor
    # LLaMA 3.1: long waves are stretched by `factor`, short ones kept, those between interpolated.
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * inverse / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inverse / factor + smooth * inverse


def rope_table(config: LlamaConfig, start: int, length: int, device: torch.device | str = "cpu") -> Rope:
    """The table for positions start .. start + length - 1."""
    angle = torch.outer(torch.arange(start, start + length, dtype=torch.float32), frequencies(config)).to(device)
    return Rope(angle.cos(), angle.sin())
