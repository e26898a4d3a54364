"""Ring attention (Liu et al. 2023): each rank has a part of the sequence, and the keys and values go round.

The sequence is cut into twice as many chunks as there are ranks, and rank r has the chunks r and 2 n - 1 - r, one after the
other: so each has as much of the causal triangle as the others (Brandon et al. 2023, "striped"; Megatron's order). Legend: B
batch, S positions on a rank, H heads, K kv heads, d head_dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pyalpaca.model import ONE_DEVICE, Axis, LlamaConfig
from pyalpaca.model.rope import Rope
from pyalpaca.ops import flash_attention_backward, flash_attention_lse
from pyalpaca.parallel.mesh import Mesh


def ring_attention(q_BSHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Causal attention of this rank's positions to those of all ranks of the group, like q; S is even and the same everywhere.

    The backward pass lets keys and values go round again, with their gradients: no rank ever holds the keys of two others.
    """
    mixed: Tensor = _Ring.apply(q_BSHd, k_BSKd, v_BSKd, group)
    return mixed


def ring_positions(length: int, rank: int, ranks: int) -> Tensor:
    """Where in the sequence the positions of a rank stand, int64 (S,); length: of the sequence, a multiple of 2 x ranks."""
    chunks = torch.arange(length).view(2 * ranks, -1)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))


def context_share(
    tokens: Tensor, labels: Tensor, mesh: Mesh, axis: Axis, pad_id: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What this rank of the context axis sees of tokens and labels (.., S), and at which positions (None: all, in order).

    Padding, with the label -100, makes of S a multiple of twice the ranks and of the axis's pieces.
    """
    if mesh.cp == 1:
        return tokens, labels, None
    more = -tokens.shape[-1] % (2 * mesh.cp * axis.pieces)
    at = ring_positions(tokens.shape[-1] + more, mesh.cp_rank, mesh.cp).to(tokens.device)
    return F.pad(tokens, (0, more), value=pad_id)[..., at], F.pad(labels, (0, more), value=-100)[..., at], at


def context_axis(axis: Axis, mesh: Mesh) -> Axis:
    """The axis of a rank that sees `context_share` of a sequence: its attention is `ring_attention`."""
    group = mesh.cp_group
    if group is None:
        return axis

    def rope_table(config: LlamaConfig, start: int, length: int, device: torch.device) -> Rope:
        # The axis knows how much of the stream's length attention sees; that is this rank's share of the sequence.
        cos, _ = axis.rope_table(config, start, length, device)
        seen = cos.shape[0]
        at = ring_positions(seen * mesh.cp, mesh.cp_rank, mesh.cp).to(device)
        whole = ONE_DEVICE.rope_table(config, start, seen * mesh.cp, device)
        return Rope(*(angles[at] for angles in whole))

    return replace(axis, rope_table=rope_table, attend=lambda q, k, v: ring_attention(q, k, v, group))


def _seen(rank: int, source: int, length: int) -> tuple[slice, slice, bool]:
    """(queries, keys, causal): what of this rank's queries sees what of the source's keys."""
    whole, half = slice(None), length // 2
    if source == rank:
        return whole, whole, True
    # Of an earlier rank all see the first chunk; of a later one only our second chunk sees anything, and it sees both.
    return (whole, slice(half), False) if source < rank else (slice(half, None), whole, False)


class _Exchange:
    """A tensor on its way to the next rank of the ring, while the previous rank's comes."""

    def __init__(self, x: Tensor, group: dist.ProcessGroup) -> None:
        ranks, me = dist.get_process_group_ranks(group), group.rank()
        self._held, self._found = x, torch.empty_like(x)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, ranks[(me + 1) % len(ranks)], group),
                dist.P2POp(dist.irecv, self._found, ranks[me - 1], group),
            ]
        )

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._found


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BSHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, group: dist.ProcessGroup) -> Tensor:
        rank, ranks, length = group.rank(), group.size(), q_BSHd.shape[1]
        ctx.group = group
        keys_values = torch.stack((k_BSKd, v_BSKd))
        wide = torch.promote_types(q_BSHd.dtype, torch.float32)
        out_BSHd = torch.zeros_like(q_BSHd, dtype=wide, memory_format=torch.contiguous_format)
        lse_BHS = out_BSHd.new_full((q_BSHd.shape[0], q_BSHd.shape[2], length), float("-inf"))
        for turn in range(ranks):
            coming = _Exchange(keys_values, group) if turn + 1 < ranks else None
            queries, keys, causal = _seen(rank, (rank - turn) % ranks, length)
            k, v = keys_values[:, :, keys]
            part_BSHd, part_BHS = flash_attention_lse(q_BSHd[:, queries], k, v, causal=causal)
            before_BHS = lse_BHS[..., queries].clone()
            after_BHS = torch.logaddexp(before_BHS, part_BHS)
            share, rest = ((x - after_BHS).exp_().transpose(1, 2).unsqueeze(-1) for x in (part_BHS, before_BHS))
            out_BSHd[:, queries].mul_(rest).add_(part_BSHd * share)
            lse_BHS[..., queries] = after_BHS
            if coming:
                keys_values = coming.wait()
        out = out_BSHd.to(q_BSHd.dtype)
        ctx.save_for_backward(q_BSHd, k_BSKd, v_BSKd, out, lse_BHS)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BSHd, k_BSKd, v_BSKd, out_BSHd, lse_BHS = ctx.saved_tensors
        group = ctx.group
        rank, ranks, length = group.rank(), group.size(), q_BSHd.shape[1]
        wide = torch.promote_types(q_BSHd.dtype, torch.float32)
        keys_values = torch.stack((k_BSKd, v_BSKd))
        dq_BSHd = torch.zeros_like(q_BSHd, dtype=wide, memory_format=torch.contiguous_format)
        # The gradients of the keys and values follow them one turn behind, and after the last turn go home.
        dkeys_values = torch.zeros_like(keys_values, dtype=wide)
        following: _Exchange | None = None
        for turn in range(ranks):
            coming = _Exchange(keys_values, group) if turn + 1 < ranks else None
            queries, keys, causal = _seen(rank, (rank - turn) % ranks, length)
            k, v = keys_values[:, :, keys]
            dout, q, out = (x[:, queries] for x in (grads[0], q_BSHd, out_BSHd))
            dq, dk, dv = flash_attention_backward(dout, q, k, v, out, lse_BHS[..., queries], causal=causal)
            dq_BSHd[:, queries] += dq
            if following:
                dkeys_values = following.wait()
            dkeys_values[:, :, keys] += torch.stack((dk, dv))
            following = _Exchange(dkeys_values, group)
            if coming:
                keys_values = coming.wait()
        assert following is not None
        dk_BSKd, dv_BSKd = following.wait().to(k_BSKd.dtype)
        return dq_BSHd.to(q_BSHd.dtype), dk_BSKd, dv_BSKd, None
