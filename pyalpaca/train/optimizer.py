"""AdamW on a tree: fp32 masters where the weights are narrower, decay groups, the global gradient norm of every layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pyalpaca.model import Parameter, shard
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
    squares = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if mine:
        squares += torch.stack(torch._foreach_norm(mine)).double().square().sum()
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
) -> None:
    """One AdamW step (Loshchilov and Hutter 2019), in place; `updates` counts the steps done before this one."""
    weights = {path: state.master.get(path, p) for path, p in trainable.items()}
    for decayed in (True, False):
        paths = [k for k, p in trainable.items() if decays(p, config) == decayed]
        if not paths:
            continue

        def pick(of: Mapping[str, Tensor], paths: Sequence[str] = paths) -> list[Tensor]:
            return [of[k] for k in paths]

        with torch.no_grad():
            adamw(
                pick(weights),
                pick(grads),
                pick(state.exp_avg),
                pick(state.exp_avg_sq),
                [],
                [torch.tensor(float(updates), device=weights[k].device) for k in paths],
                fused=weights[paths[0]].device.type in ("cpu", "cuda"),
                amsgrad=False,
                beta1=config.beta1,
                beta2=config.beta2,
                lr=lr,
                weight_decay=config.weight_decay if decayed else 0.0,
                eps=config.eps,
                maximize=False,
            )
    with torch.no_grad():
        for path, master in state.master.items():
            trainable[path].copy_(master)
