"""The interpreter of pipeline schedules: runs a stage's actions, moving activations forward and gradients backward."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pyalpaca.parallel.mesh import Mesh
from pyalpaca.parallel.schedule import Action

# forward_stage(micro_batch, hidden states or None) -> hidden states, or on the last stage the loss to differentiate.
ForwardStage = Callable[[int, Tensor | None], Tensor]


def run_pipeline(
    actions: Sequence[Action],
    forward_stage: ForwardStage,
    leaves: Sequence[Tensor],
    hidden_shape: Sequence[int],
    hidden_dtype: torch.dtype,
    mesh: Mesh,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run the actions; return the gradients of `leaves`, summed over micro-batches in fp32, and the losses (last stage only).

    hidden_shape, hidden_dtype: of what passes between stages, the same for every micro-batch.
    """
    grads: list[Tensor] | None = None
    losses: list[Tensor] = []
    held: dict[int, tuple[Tensor | None, Tensor]] = {}
    in_transit: deque[tuple[dist.Work, Tensor]] = deque()  # a tensor lives until its send is complete

    def send(x: Tensor, step: int, micro_batch: int) -> None:
        work = dist.isend(x, mesh.stage_neighbour(step), mesh.pp_group, tag=2 * micro_batch + (step < 0))
        assert work is not None
        in_transit.append((work, x))
        # gloo learns of a completed send only by waiting for it. In 1F1B the neighbours have received all but the last
        # 2 pp sends by now (each gradient that came back says so), so this neither blocks nor lets tensors pile up.
        while len(in_transit) > 2 * mesh.pp + 2:
            in_transit.popleft()[0].wait()

    def receive(step: int, micro_batch: int) -> Tensor:
        x = torch.empty(hidden_shape, dtype=hidden_dtype, device=mesh.device)
        dist.recv(x, mesh.stage_neighbour(step), mesh.pp_group, tag=2 * micro_batch + (step > 0))
        return x

    for kind, i, _ in actions:
        if kind == "forward":
            x = None if mesh.first_stage else receive(-1, i).requires_grad_()
            y = forward_stage(i, x)
            if mesh.last_stage:
                losses.append(y.detach())
            else:
                send(y.detach().contiguous(), 1, i)
            held[i] = x, y
        else:
            x, y = held.pop(i)
            grad_y = None if mesh.last_stage else receive(1, i)
            wanted = [*leaves] if x is None else [*leaves, x]
            found = list(torch.autograd.grad(y, wanted, grad_y))
            if x is not None:
                send(found.pop().contiguous(), -1, i)
            if grads is None:
                grads = [g.float() for g in found]
            else:
                torch._foreach_add_(grads, found)
    for work, _ in in_transit:
        work.wait()
    assert grads is not None, "a schedule has at least one backward action"
    return grads, losses
