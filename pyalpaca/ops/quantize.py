"""Weights as integers: 8 bits each, or 4 with two in a byte, and a scale for each group of a row.

A number stands for integer x scale, so the middle of the range is 0 (Dettmers et al. 2022 for rows, Frantar et al. 2022 for
groups). Four bits lie as in GGUF's Q4_0: of 16 bytes for 32 numbers, byte j holds numbers j (low half) and 16 + j, each plus 8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # numbers of four bits that share 16 bytes; groups are whole blocks
GROUPS = (32, 64, 128, 256)
_AT_ONCE = 1 << 22  # numbers, so that what is in between stays small
_SHRINK = (1.0, 0.9)  # of the four-bit range: often a little less of the extreme is a smaller error in all


def group_of(width: int, groups: int) -> int:
    """The numbers that share a scale, from a row's width and how many scales it has: all, or a power of two.

    A group is more than half of any other power of two that would give as many scales, so it is the only one.
    """
    if groups <= 1:
        return max(-(-width // BLOCK), 1) * BLOCK
    return 1 << (-(-width // groups) - 1).bit_length()


def quantize(weight_NK: Tensor, bits: int, group: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight as integers and their scales: int8 (N, K), or uint8 (N, 16 ceil(K / 32)) of 4 bits; fp32 (N, ceil(K / group)).

    group: numbers of a row that share a scale, one of GROUPS; None: the whole row for 8 bits, 32 for 4.
    ValueError for other bits or groups, and for a weight with infinities or NaN.
    """
    if bits not in (4, 8) or group not in (None, *GROUPS):
        choice = ", ".join(map(str, GROUPS))
        raise ValueError(f"found {bits} bits in groups of {group}, expected 4 or 8 in groups of {choice}")
    rows, width = weight_NK.shape
    group = group or (group_of(width, 1) if bits == 8 else BLOCK)
    if not rows or not width:
        columns, dtype = (width, torch.int8) if bits == 8 else (-(-width // BLOCK) * BLOCK // 2, torch.uint8)
        return weight_NK.new_empty(rows, columns, dtype=dtype), weight_NK.new_empty(rows, -(-width // group), dtype=torch.float32)
    pieces = [_quantize(piece, bits, group) for piece in weight_NK.split(max(_AT_ONCE // width, 1))]
    stored, scale = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    if not torch.isfinite(scale).all():
        raise ValueError("the weight holds infinities or NaN, expected finite numbers; it can't be quantised")
    return stored, scale


def _quantize(weight_NK: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    rows, width = weight_NK.shape
    w_NGg = F.pad(weight_NK.detach().float(), (0, -width % group)).view(rows, -1, group)
    if bits == 8:
        scale_NG = w_NGg.abs().amax(-1) / 127
        q_NGg = _divided(w_NGg, scale_NG).round_().clamp_(-127, 127)
        return q_NGg.to(torch.int8).view(rows, -1)[:, :width].contiguous(), scale_NG
    # The number farthest from 0, with its sign, becomes -8: that end of the range reaches farther than the other one.
    far_NG = w_NGg.gather(-1, w_NGg.abs().argmax(-1, keepdim=True)).squeeze(-1) / -8
    best_NG, scale_NG = torch.full_like(far_NG, torch.inf), far_NG.clone()
    for shrink in _SHRINK:
        found_NG = far_NG * shrink
        error_NG = _four_bits(w_NGg, found_NG).mul_(found_NG.unsqueeze(-1)).sub_(w_NGg).square_().sum(-1)
        scale_NG = torch.where(error_NG < best_NG, found_NG, scale_NG)
        best_NG = torch.minimum(best_NG, error_NG)
    q_NK = _four_bits(w_NGg, scale_NG).add_(8).to(torch.uint8).view(rows, -1)
    q_NK = q_NK[:, : -(-width // BLOCK) * BLOCK]
    low, high = q_NK.view(rows, -1, 2, BLOCK // 2).unbind(2)
    return (low | high << 4).view(rows, -1), scale_NG


def _four_bits(w_NGg: Tensor, scale_NG: Tensor) -> Tensor:
    return _divided(w_NGg, scale_NG).round_().clamp_(-8, 7)


def _divided(w_NGg: Tensor, scale_NG: Tensor) -> Tensor:
    """w / scale, 0 in a group of zeros."""
    return w_NGg / scale_NG.masked_fill(scale_NG == 0, 1.0).unsqueeze(-1)


def dequantize(stored: Tensor, scale_NG: Tensor, width: int) -> Tensor:
    """The fp32 weight (N, width) that `quantize` has stored."""
    rows, group = stored.shape[0], group_of(width, scale_NG.shape[1])
    if stored.dtype == torch.uint8:
        blocks = stored.shape[1] * 2 // BLOCK
        halves = stored.reshape(rows, blocks, 1, BLOCK // 2)
        stored = (torch.cat((halves & 15, halves >> 4), 2).to(torch.int8) - 8).view(rows, blocks * BLOCK)
    return stored[:, :width].float() * scale_NG.repeat_interleave(group, 1)[:, :width]
