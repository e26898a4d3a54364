"""The tensor-parallel axis (Shoeybi et al. 2019): what the model's forward pass needs, made from a mesh's process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pyalpaca.model import ONE_DEVICE, Axis, cut
from pyalpaca.parallel.collectives import all_gather_columns, all_reduce
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


class _CrossEntropy(torch.autograd.Function):
    """Per-token loss from the vocabulary columns [start, stop) of each rank; the whole logits never meet on one rank."""

    @staticmethod
    def forward(ctx: Any, logits_BSV: Tensor, labels_BS: Tensor, start: int, group: dist.ProcessGroup) -> Tensor:
        x = logits_BSV.float()
        top_BS1 = all_reduce(x.amax(-1, keepdim=True), group, dist.ReduceOp.MAX)
        probability = (x - top_BS1).exp_()
        total_BS1 = all_reduce(probability.sum(-1, keepdim=True), group)
        local = labels_BS - start
        mine = (local >= 0) & (local < x.shape[-1])
        index_BS1 = local.where(mine, 0).unsqueeze(-1)
        target_BS = all_reduce(x.gather(-1, index_BS1).squeeze(-1).where(mine, 0.0), group)
        counted = labels_BS != -100
        loss_BS = (total_BS1.log() + top_BS1).squeeze(-1) - target_BS
        ctx.save_for_backward(probability.div_(total_BS1), index_BS1, mine, counted)
        ctx.dtype = logits_BSV.dtype
        return loss_BS.where(counted, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        probability, index_BS1, mine, counted = ctx.saved_tensors
        # Saved tensors may be used by a second backward pass, so this one works on a copy.
        grad = probability.clone()
        grad.scatter_add_(-1, index_BS1, -mine.unsqueeze(-1).to(grad.dtype))
        return (grad * grads[0].where(counted, 0.0).unsqueeze(-1)).to(ctx.dtype), None, None, None


def tensor_axis(mesh: Mesh, vocab_size: int) -> Axis:
    """The Axis of a mesh; vocab_size: of the whole model, cut as the sharding table says (the last rank takes the remainder)."""
    group = mesh.tp_group
    if group is None:
        return ONE_DEVICE
    shares = [cut(vocab_size, rank, mesh.tp, uneven=True) for rank in range(mesh.tp)]
    start, stop = shares[mesh.tp_rank]

    def embedding(weight_VD: Tensor, tokens_BS: Tensor) -> Tensor:
        mine = (tokens_BS >= start) & (tokens_BS < stop)
        rows_BSD = F.embedding((tokens_BS - start).where(mine, 0), weight_VD)
        return _Exit.apply(rows_BSD * mine.unsqueeze(-1), group)

    return Axis(
        rank=mesh.tp_rank,
        size=mesh.tp,
        enter=lambda x: _Enter.apply(x, group),
        exit=lambda x: _Exit.apply(x, group),
        embedding=embedding,
        cross_entropy=lambda logits, labels: _CrossEntropy.apply(logits, labels, start, group),
        gather_logits=lambda x: all_gather_columns(x, [b - a for a, b in shares], group),
    )
