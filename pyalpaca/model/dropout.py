"""Dropout before LoRA's first factor, as in PEFT, whose masks need no generator: each bit is a hash of where it stands.

A bit depends on the seed, the sample's number in the run, the layer and module, the token and the feature. So every layout of
ranks has the same masks, a run that resumes goes on with them, and the backward pass makes them again instead of keeping them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyalpaca.model.recompute import Again

# drop(x, module) -> x as the LoRA factors of that module (`q`, `down`, ..) get it.
Drop = Callable[[Tensor, str], Tensor]


def undropped(x: Tensor, module: str) -> Tensor:
    return x


@dataclass(frozen=True)
class Dropout:
    """Share of features dropped, in [0, 1); the run's seed; the samples' numbers in the run, int64 (B,).

    positions: where the tokens stand in their samples, int64 (S,); None: one after the other, from 0.
    """

    rate: float
    seed: int
    samples: Tensor
    positions: Tensor | None = None


def mask(dropout: Dropout, place: str, num_tokens: int, first: int, stop: int) -> Tensor:
    """Which of the features [first, stop) are kept, bool (B, S, stop - first); place: the name of what is dropped."""
    device = dropout.samples.device
    key = zlib.crc32(f"{dropout.seed} {place}".encode()) - (1 << 31)
    samples_B = _mix((dropout.samples % (1 << 31)).int() + key)
    places = dropout.positions
    tokens_S = torch.arange(num_tokens, dtype=torch.int32, device=device) if places is None else places.int()
    rows_BS = _mix(samples_B.unsqueeze(-1) + tokens_S)
    columns_I = _mix(torch.arange(first, stop, dtype=torch.int32, device=device) ^ key)
    threshold = min(round(dropout.rate * (1 << 32)), (1 << 32) - 1) - (1 << 31)
    return _mix(rows_BS.unsqueeze(-1) + columns_I) >= threshold


def _mix(x: Tensor) -> Tensor:
    """32 bits well mixed, in place: MurmurHash3's finalizer (Appleby 2011) with signed shifts, without the last one."""
    x ^= x >> 16
    x *= 0x85EBCA6B - (1 << 32)
    x ^= x >> 13
    x *= 0xC2B2AE35 - (1 << 32)
    return x


class _Drop(torch.autograd.Function):
    """x, where kept, over the share that is kept; nothing is saved, the backward pass makes the mask again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[[], Tensor], scale: float) -> Tensor:
        ctx.make, ctx.scale = make, scale
        return x * make() * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.make() * ctx.scale, None, None


def dropper(dropout: Dropout, layer: int, rank: int, again: Again) -> Drop:
    """The Drop of one layer; rank: in tensor parallelism, which cuts the features that `o` and `down` get."""

    def drop(x_BSI: Tensor, module: str) -> Tensor:
        num_tokens, size = x_BSI.shape[1:]  # and not x itself, which the graph would then hold
        first = rank * size if module in ("o", "down") else 0

        def make() -> Tensor:
            return mask(dropout, f"layers.{layer}.{module}", num_tokens, first, first + size)

        def apply(x: Tensor) -> Tensor:
            return _Drop.apply(x, make, 1 / (1 - dropout.rate))

        return again(apply(x_BSI), apply, x_BSI)

    return drop
