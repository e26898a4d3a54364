"""The few collectives that the runtime uses; each is the identity where its group is None (an axis of size 1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET_BYTES = 32 << 20


def all_reduce(x: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The reduction of x over the group; x itself is overwritten where it is contiguous."""
    if group is None:
        return x
    x = x.contiguous()
    dist.all_reduce(x, op, group)
    return x


def all_reduce_buckets(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum each tensor over the group, in place; small ones travel together in buckets of 32 MB."""
    if group is None:
        return
    bucket: list[Tensor] = []

    def flush() -> None:
        if not bucket:
            return
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))
        bucket.clear()

    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > _BUCKET_BYTES):
            flush()
            size = 0
        bucket.append(tensor)
        size += tensor.nbytes
    flush()


def all_gather_columns(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Concatenate the ranks' last dimensions, of `sizes` columns; shares need not be equal."""
    wide = torch.nn.functional.pad(x, (0, max(sizes) - x.shape[-1])).contiguous()
    parts = [torch.empty_like(wide) for _ in sizes]
    dist.all_gather(parts, wide, group)
    return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], -1)


# torch 2.13 gave these two new names and warns of the old ones.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def start_all_reduce(x: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Begin to sum x over the group, in place; x must not be touched before the work's `wait`."""
    return cast(dist.Work, dist.all_reduce(x, group=group, async_op=True))


def start_reduce_scatter(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Begin to sum x (ranks, ...) over the group; `out` (...) gets this rank's part."""
    return cast(dist.Work, _reduce_scatter(out, x.flatten(), group=group, async_op=True))


def start_all_gather(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Begin to collect the ranks' x (...) in `out` (ranks, ...)."""
    return cast(dist.Work, _all_gather(out.view(-1), x, group=group, async_op=True))


def all_gather_sequence(x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' pieces (B, S, D) one after the other: (B, ranks x S, D)."""
    parts = [torch.empty_like(x_BSD, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x_BSD.contiguous(), group)
    return torch.cat(parts, 1)


def reduce_scatter_sequence(x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's piece (B, S / ranks, D) of the sum over the group of (B, S, D); S is a multiple of the ranks."""
    parts = [part.contiguous() for part in x_BSD.chunk(group.size(), 1)]
    piece = torch.empty_like(parts[0])
    dist.reduce_scatter(piece, parts, group=group)
    return piece


def broadcast(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The x of the group's first rank, on every rank."""
    if group is not None:
        dist.broadcast(x, group=group, group_src=0)
    return x


def broadcast_object(value: Any, group: dist.ProcessGroup | None) -> Any:
    """The value of the group's first rank, on every rank; any object that can be pickled."""
    if group is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes in the order of their ranks, on each of them; any object that can be pickled."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()
