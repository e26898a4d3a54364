"""The tensor-parallel axis (Shoeybi et al. 2019), with or without sequence parallelism (Korthikanti et al. 2022).

It is what the model's forward pass needs of a mesh, made from its process group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pyalpaca.model import ONE_DEVICE, Axis, Parameter, cut
from pyalpaca.ops import Shards, linear_cross_entropy
from pyalpaca.parallel.collectives import all_gather_columns, all_gather_sequence, all_reduce, reduce_scatter_sequence
from pyalpaca.parallel.mesh import Mesh


class _Enter(torch.autograd.Function):
    """Identity forward, sum over ranks backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0].clone(), ctx.group), None


class _Exit(torch.autograd.Function):
    """Sum over ranks forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    """The pieces of the sequence gathered forward; this rank's piece of the summed gradient backward."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_sequence(x_BSD, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_sequence(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    """This rank's piece of the sum over ranks forward; the gradient's pieces gathered backward."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_sequence(x_BSD, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_sequence(grads[0], ctx.group), None


def tensor_axis(mesh: Mesh, vocab_size: int, sequence_parallel: bool = False) -> Axis:
    """The Axis of a mesh; vocab_size: of the whole model, cut as the sharding table says (the last rank takes the remainder).

    sequence_parallel: the residual stream is cut along the sequence (training only; gradients: see `sequence_parameters`).
    A length that tp does not divide is filled up with zeros, which causal attention keeps from the tokens before them.
    """
    group = mesh.tp_group
    if group is None:
        return ONE_DEVICE
    shares = [cut(vocab_size, rank, mesh.tp, uneven=True) for rank in range(mesh.tp)]
    start, stop = shares[mesh.tp_rank]

    def rows(weight_VD: Tensor, tokens_BS: Tensor) -> Tensor:
        mine = (tokens_BS >= start) & (tokens_BS < stop)
        return F.embedding((tokens_BS - start).where(mine, 0), weight_VD) * mine.unsqueeze(-1)

    def filled(x_BSD: Tensor) -> Tensor:
        return F.pad(x_BSD, (0, 0, 0, -x_BSD.shape[1] % mesh.tp))

    most = max(last - first for first, last in shares)
    shards = Shards(start, lambda x: all_reduce(x, group, dist.ReduceOp.MAX), lambda x: all_reduce(x, group), most)
    whole = Axis(
        rank=mesh.tp_rank,
        size=mesh.tp,
        enter=lambda x: _Enter.apply(x, group),
        exit=lambda x: _Exit.apply(x, group),
        embedding=lambda weight, tokens: _Exit.apply(rows(weight, tokens), group),
        head_loss=lambda x, weight, labels, scale: linear_cross_entropy(x, weight, labels, scale, shards),
        gather_logits=lambda x: all_gather_columns(x, [b - a for a, b in shares], group),
    )
    if not sequence_parallel:
        return whole
    return replace(
        whole,
        pieces=mesh.tp,
        enter=lambda x: _Gather.apply(x, group),
        exit=lambda x: _Scatter.apply(x, group),
        embedding=lambda weight, tokens: _Scatter.apply(filled(rows(weight, tokens)), group),
        head_loss=lambda x, *rest: whole.head_loss(x[:, : rest[1].shape[1]], *rest),
        rope_table=lambda config, at, length, device: ONE_DEVICE.rope_table(config, at, length * mesh.tp, device),
    )


def sequence_parameters(table: Iterable[Parameter]) -> list[Parameter]:
    """The table under sequence parallelism: norms see a piece of the sequence, so each rank's gradient is only a summand."""
    return [replace(p, partial_grad=True) if p.dim is None and len(p.shape) == 1 else p for p in table]
