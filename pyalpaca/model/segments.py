"""Attention kept apart between the samples that share a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from pyalpaca.ops import flash_attention_packed

Starts = Sequence[Sequence[int]]
"""Of each row, where its samples begin, the first at 0."""


def attend_apart(starts: Starts) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """An `Axis.attend` in which no token sees another sample's; what follows a row's last sample, padding, belongs to it.

    Rotary embedding only tells how far apart two tokens are, so a sample's positions need not begin at 0.
    """

    def attend(q_BSHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor) -> Tensor:
        batch, length = q_BSHd.shape[:2]
        begins = [i * length + at for i, row in enumerate(starts) for at in row if at < length]
        q_NHd, k_NKd, v_NKd = (x.flatten(0, 1) for x in (q_BSHd, k_BSKd, v_BSKd))
        return flash_attention_packed(q_NHd, k_NKd, v_NKd, [*begins, batch * length]).view_as(q_BSHd)

    return attend
