"""Attention kept apart between the samples that share a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pyalpaca.ops import flash_attention

Starts = Sequence[Sequence[int]]
"""Of each row, where its samples begin, the first at 0."""


def attend_apart(starts: Starts) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """An `Axis.attend` in which no token sees another sample's; what follows a row's last sample, padding, belongs to it.

    Rotary embedding only tells how far apart two tokens are, so a sample's positions need not begin at 0.
    """

    def attend(q_BSHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor) -> Tensor:
        length = q_BSHd.shape[1]
        # Splitting all rows at once makes the gradient one concatenation.
        lengths = [b - a for row in starts for a, b in pairwise([*(at for at in row if at < length), length])]
        parts = (x.flatten(0, 1).split(lengths) for x in (q_BSHd, k_BSKd, v_BSKd))
        mixed = [flash_attention(*(x.unsqueeze(0) for x in part)) for part in zip(*parts, strict=True)]
        return torch.cat(mixed, 1).view_as(q_BSHd)

    return attend
