"""Gradients on their way: summed in fp32 over micro-batches, and over data-parallel ranks while the backward pass still runs.

A bucket is one flat tensor of `ranks` chunks. Plain data parallelism has one chunk, which is summed for everybody. With ZeRO-1
(Rajbhandari et al. 2020) there is one for each rank with that rank's rows of every tensor: a reduce-scatter leaves each rank
the sum of its own rows, and once these have been updated, an all-gather brings the weights together again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pyalpaca.parallel import start_all_gather, start_all_reduce, start_reduce_scatter


def row_range(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """[start, stop) of `rank`'s rows; shares differ by at most one row and may be empty."""
    return rank * rows // ranks, (rank + 1) * rows // ranks


def own_rows(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """The rows of a tensor (its first dimension) that `rank` updates, as a view."""
    start, stop = row_range(tensor.shape[0], rank, ranks)
    return tensor[start:stop]


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together. slots: where each one's rows begin in every chunk, and its shape; chunk: in elements."""

    slots: Mapping[str, tuple[int, torch.Size]]
    chunk: int
    ranks: int

    def views(self, chunk: Tensor, rank: int) -> Iterator[tuple[str, Tensor]]:
        """(path, rows that `rank` updates) of each tensor, as views of that rank's chunk."""
        for path, (offset, shape) in self.slots.items():
            start, stop = row_range(shape[0], rank, self.ranks)
            size = (stop - start, *shape[1:])
            yield path, chunk.narrow(0, offset, torch.Size(size).numel()).view(size)


def make_buckets(tensors: Mapping[str, Tensor], ranks: int, size: int) -> list[Bucket]:
    """Buckets of about `size` elements over tensors in the tree's order; the last come first, as the backward pass has them."""
    buckets: list[Bucket] = []
    slots: dict[str, tuple[int, torch.Size]] = {}
    chunk = 0
    for path in reversed(list(tensors)):
        shape = tensors[path].shape
        if slots and ranks * chunk + shape.numel() > size:
            buckets.append(Bucket(slots, chunk, ranks))
            slots, chunk = {}, 0
        slots[path] = chunk, shape
        chunk += -(-shape[0] // ranks) * shape[1:].numel()
    return [*buckets, Bucket(slots, chunk, ranks)] if slots else buckets


def collect(
    leaves: Mapping[str, Tensor], passes: int, buckets: Sequence[Bucket], rank: int, group: dist.ProcessGroup | None
) -> Callable[[], dict[str, Tensor]]:
    """Take over the gradients of `leaves` as `passes` backward passes bring them; the returned function gives their sums.

    Sums are fp32, over passes and over the group: of the whole tensors, or with buckets of several chunks of `rank`'s rows.
    A bucket sets out as soon as its last gradient is there; all ranks send them in the same order. Without a group there are
    no buckets: the first gradient itself becomes the sum, and stays as narrow as the leaf if it is that of the only pass.
    """
    sums: dict[str, Tensor] = {}

    def add(path: str, leaf: Tensor) -> None:
        assert leaf.grad is not None
        if path in sums:
            sums[path] += leaf.grad
        else:
            sums[path] = leaf.grad if passes == 1 else leaf.grad.float()
        leaf.grad = None

    if group is None:
        for path, leaf in leaves.items():
            leaf.register_post_accumulate_grad_hook(lambda leaf, path=path: add(path, leaf))
        return lambda: {path: sums[path] for path in leaves}

    device = next(iter(leaves.values())).device
    flats: list[Tensor | None] = [None] * len(buckets)
    awaited = [passes * len(bucket.slots) for bucket in buckets]
    sent: list[tuple[dist.Work, Tensor]] = []
    pieces: dict[str, list[Tensor]] = {}

    def begin(k: int) -> None:
        flats[k] = flat = torch.zeros((buckets[k].ranks, buckets[k].chunk), device=device)
        for r in range(buckets[k].ranks):
            for path, view in buckets[k].views(flat[r], r):
                pieces.setdefault(path, []).append(view)

    def send(k: int) -> None:
        flat = flats[k]
        assert flat is not None
        if buckets[k].ranks == 1:
            sent.append((start_all_reduce(flat, group), flat[0]))
        else:
            own = torch.empty_like(flat[0])
            sent.append((start_reduce_scatter(own, flat, group), own))

    def arrive(path: str, k: int, leaf: Tensor) -> None:
        assert leaf.grad is not None
        if flats[k] is None:
            begin(k)
        start = 0
        for piece in pieces[path]:
            piece += leaf.grad[start : start + piece.shape[0]]
            start += piece.shape[0]
        leaf.grad = None
        awaited[k] -= 1
        while len(sent) < len(buckets) and not awaited[len(sent)]:
            send(len(sent))

    for k, bucket in enumerate(buckets):
        for path in bucket.slots:
            leaves[path].register_post_accumulate_grad_hook(lambda leaf, path=path, k=k: arrive(path, k, leaf))

    def finish() -> dict[str, Tensor]:
        assert len(sent) == len(buckets), "every leaf has had its gradient in every pass"
        for k, (work, own) in enumerate(sent):
            work.wait()
            flats[k] = None
            sums.update(buckets[k].views(own, rank if buckets[k].ranks > 1 else 0))
        # Leaves, hooks and these refer to each other in a circle, which would keep the buckets until Python looks for circles.
        pieces.clear()
        sent.clear()
        return {path: sums[path] for path in leaves}

    return finish


def gather_rows(weights: Mapping[str, Tensor], buckets: Sequence[Bucket], rank: int, group: dist.ProcessGroup) -> None:
    """Bring together what each rank has updated: its own rows of every weight go to all others, in place."""
    on_the_way: list[tuple[dist.Work, Bucket, Tensor]] = []

    def land() -> None:
        work, bucket, flat = on_the_way.pop(0)
        work.wait()
        for r in range(bucket.ranks):
            if r != rank:
                for path, view in bucket.views(flat[r], r):
                    own_rows(weights[path], r, bucket.ranks).copy_(view)

    for bucket in buckets:
        like = weights[next(iter(bucket.slots))]
        own = like.new_zeros(bucket.chunk)
        for path, view in bucket.views(own, rank):
            view.copy_(own_rows(weights[path], rank, bucket.ranks))
        flat = like.new_empty((bucket.ranks, bucket.chunk))
        on_the_way.append((start_all_gather(flat, own, group), bucket, flat))
        if len(on_the_way) > 1:  # one is unpacked while the next one travels
            land()
    while on_the_way:
        land()
