"""AdamW on a tree: fp32 masters where the weights are narrower, decay groups, the global gradient norm of every layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyalpaca.model import Parameter, shard
from pyalpaca.ops import adamw_, grad_norm
from pyalpaca.parallel import Mesh, all_reduce
from pyalpaca.train.config import TrainConfig
from pyalpaca.train.reduction import own_rows, row_range


class OptimizerState(NamedTuple):
    """Moments and fp32 masters by dotted path; `master` is empty where the weights themselves are fp32.

    With ZeRO-1 they are only of the rows that this data-parallel rank updates.
    """

    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    master: dict[str, Tensor]


def zero_ranks(mesh: Mesh, config: TrainConfig) -> int:
    """How many ranks that hold the same weights share the optimizer's state; 1: each has all of it."""
    return mesh.replicas if config.zero else 1


def updated(trainable: Mapping[str, Tensor], mesh: Mesh, config: TrainConfig) -> dict[str, Tensor]:
    """What this rank's optimizer works on: the trainable tensors, with ZeRO-1 its own rows of them, as views."""
    return {
        k: own_rows(p, mesh.replica_rank, ranks) if (ranks := zero_ranks(mesh, config)) > 1 else p for k, p in trainable.items()
    }


def updated_place(parameter: Parameter, mesh: Mesh, config: TrainConfig) -> list[tuple[int, int, int]] | None:
    """Where that lies in the whole parameter: a (dim, start, stop) for each dimension that is cut; None: it is the whole."""
    piece, ranks = shard(parameter, mesh.tp_rank, mesh.tp), zero_ranks(mesh, config)
    if ranks == 1:
        return [piece] if piece else None
    first, last = piece[1:] if piece and piece[0] == 0 else (0, parameter.shape[0])
    start, stop = row_range(last - first, mesh.replica_rank, ranks)
    return [(0, first + start, first + stop), *([piece] if piece and piece[0] != 0 else [])]


def init_optimizer(trainable: Mapping[str, Tensor]) -> OptimizerState:
    """Zero moments for every trainable tensor, and a master copy of those that are not fp32."""
    return OptimizerState(
        {k: torch.zeros_like(p, dtype=torch.float32) for k, p in trainable.items()},
        {k: torch.zeros_like(p, dtype=torch.float32) for k, p in trainable.items()},
        {k: p.detach().float() for k, p in trainable.items() if p.dtype != torch.float32},
    )


def gradient_norm(grads: Mapping[str, Tensor], table: Mapping[str, Parameter], mesh: Mesh, zero: bool = False) -> Tensor:
    """The 2-norm of the whole model's gradient, fp32 scalar: what several ranks hold a copy of is counted once.

    zero: each replica has only its own rows.
    """
    mine = [g for path, g in grads.items() if table[path].dim is not None or mesh.tp_rank == 0]
    squares = grad_norm(mine).square() if mine else torch.zeros((), dtype=torch.float64, device=mesh.device)
    for group in (mesh.tp_group, mesh.pp_group, mesh.replica_group if zero else None):
        squares = all_reduce(squares, group)
    return squares.sqrt().float()


def decays(p: Tensor, config: TrainConfig) -> bool:
    """Whether weight decay pulls at a parameter: not at biases and, unless the settings say so, not at norms."""
    return config.decay_norms or p.dim() > 1


def update(
    trainable: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: OptimizerState,
    updates: int,
    lr: float,
    config: TrainConfig,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW step (Loshchilov and Hutter 2019), in place; `updates` counts the steps done before this one.

    grad_scale: what the gradients are multiplied by on their way, which is what a loss scale and clipping come to.
    """
    for narrow in (True, False):
        paths = [path for path in trainable if (path in state.master) == narrow]
        adamw_(
            [state.master[path] if narrow else trainable[path].detach() for path in paths],
            [grads[path] for path in paths],
            [state.exp_avg[path] for path in paths],
            [state.exp_avg_sq[path] for path in paths],
            copies=[trainable[path].detach() for path in paths] if narrow else (),
            weight_decays=[config.weight_decay if decays(trainable[path], config) else 0.0 for path in paths],
            step=updates + 1,
            lr=lr,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            grad_scale=grad_scale,
        )
