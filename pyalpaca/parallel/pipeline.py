"""The interpreter of pipeline schedules: runs a stage's actions, moving activations forward and gradients backward."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pyalpaca.parallel.deferred import Deferred, Note, give
from pyalpaca.parallel.mesh import Mesh
from pyalpaca.parallel.schedule import Action

# forward_stage(micro_batch, hidden states or None) -> hidden states, or at the end of the model the loss to differentiate.
ForwardStage = Callable[[int, Tensor | None], Tensor]


def run_pipeline(
    actions: Sequence[Action],
    forward_stage: ForwardStage | Sequence[ForwardStage],
    leaves: Sequence[Tensor],
    hidden_shape: Sequence[int],
    hidden_dtype: torch.dtype,
    mesh: Mesh,
    deferred: Deferred | None = None,
) -> list[Tensor]:
    """Run the actions; return the losses (last stage only).

    forward_stage: of this stage, or one for each of its chunks, in the order of the layers.
    leaves: tensors whose gradients are wanted; each action's go to their `grad`, where a hook of the caller takes them.
    hidden_shape, hidden_dtype: of what passes between stages, the same for every micro-batch.
    deferred: has wrapped the trees of forward_stage; a schedule with weight actions wants it.
    """
    chunks = [forward_stage] if callable(forward_stage) else forward_stage
    losses: list[Tensor] = []
    held: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
    put_off: dict[tuple[int, int], list[Note]] = {}
    # A tensor lives until its send is complete. Each direction has its own queue, which the neighbour empties in order.
    in_transit: dict[int, deque[tuple[dist.Work, Tensor]]] = {1: deque(), -1: deque()}
    wanted = [*leaves, deferred.anchor] if deferred else [*leaves]
    most = (len(chunks) + 1) * mesh.pp + 2

    def tag(step: int, micro_batch: int, boundary: int) -> int:
        """One for each message; boundary: the virtual stage below it, divided by the stages."""
        return 2 * (micro_batch * (len(chunks) + 1) + boundary) + (step < 0)

    def send(x: Tensor, step: int, micro_batch: int, chunk: int) -> None:
        boundary = chunk if step > 0 else chunk - mesh.first_stage
        work = dist.isend(x, mesh.stage_neighbour(step), mesh.pp_group, tag=tag(step, micro_batch, boundary))
        assert work is not None
        in_transit[step].append((work, x))
        # gloo learns of a completed send only by waiting for it. What a neighbour has not yet received belongs to a micro-batch
        # that is under way, and no more than `most` of these are, so this neither blocks nor lets tensors pile up.
        while len(in_transit[step]) > most:
            in_transit[step].popleft()[0].wait()

    def receive(step: int, micro_batch: int, chunk: int) -> Tensor:
        x = torch.empty(hidden_shape, dtype=hidden_dtype, device=mesh.device)
        boundary = chunk if step > 0 else chunk - mesh.first_stage
        dist.recv(x, mesh.stage_neighbour(step), mesh.pp_group, tag=tag(-step, micro_batch, boundary))
        return x

    for kind, i, chunk in actions:
        first = mesh.first_stage and chunk == 0
        last = mesh.last_stage and chunk == len(chunks) - 1
        if kind == "forward":
            x = None if first else receive(-1, i, chunk).requires_grad_()
            y = chunks[chunk](i, x)
            if last:
                losses.append(y.detach())
            else:
                send(y.detach().contiguous(), 1, i, chunk)
            held[i, chunk] = x, y
        elif kind == "weight":
            give(put_off.pop((i, chunk)))
        else:
            x, y = held.pop((i, chunk))
            grad_y = None if last else receive(1, i, chunk)
            torch.autograd.backward(y, grad_y, inputs=wanted if x is None else [*wanted, x])
            if x is not None:
                assert x.grad is not None
                send(x.grad.contiguous(), -1, i, chunk)
            if kind == "input":
                assert deferred is not None, "a schedule with weight actions wants its weight gradients deferred"
                put_off[i, chunk] = deferred.take()
    for queue in in_transit.values():
        for work, _ in queue:
            work.wait()
    return losses
