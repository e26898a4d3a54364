"""One training step: state, batch -> state, metrics. The same for one process and for any mesh."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from pyalpaca.model import (
    Axis,
    Dropout,
    LlamaConfig,
    Parameter,
    Recompute,
    Starts,
    Tree,
    attend_apart,
    flatten,
    forward,
    unflatten,
)
from pyalpaca.parallel import Deferred, Mesh, all_reduce, all_reduce_buckets, context_share, pipeline_schedule, run_pipeline
from pyalpaca.train.config import TrainConfig
from pyalpaca.train.finite import first_bad
from pyalpaca.train.optimizer import OptimizerState, gradient_norm, update, updated, zero_ranks
from pyalpaca.train.reduction import collect, gather_rows, make_buckets
from pyalpaca.train.schedule import LossScale, learning_rate, next_loss_scale


@dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step.

    params: this rank's parameter tree. optimizer: moments and masters of the trainable part.
    step: steps done; updates: those that changed the weights (fp16 overflows do not); samples: position in the data.
    """

    params: Tree
    optimizer: OptimizerState
    loss_scale: LossScale
    step: int = 0
    updates: int = 0
    samples: int = 0
    nan_steps: int = 0


@dataclass(frozen=True)
class Setup:
    """What stays the same during a run.

    table: this stage's parameters by path; trainable: the paths that learn; chunks: the paths of each of the stage's chunks of
    layers, of which only an interleaved schedule has several.
    """

    config: TrainConfig
    model: LlamaConfig
    mesh: Mesh
    axis: Axis
    table: Mapping[str, Parameter]
    trainable: frozenset[str]
    chunks: tuple[tuple[str, ...], ...]

    def trees(self, values: Mapping[str, Tensor]) -> list[Tree]:
        """The tree of each chunk, in the order of the layers."""
        return [unflatten({path: values[path] for path in paths}) for paths in self.chunks]


@dataclass(frozen=True)
class Metrics:
    """What a step reports: the token mean of the loss over the global batch, and the scalars around it."""

    loss: float
    grad_norm: float
    learning_rate: float
    loss_scale: float
    skipped: bool


def label_count(labels_NBS: Tensor, mesh: Mesh) -> Tensor:
    """How many labels the global batch has, fp32 scalar, at least 1."""
    return all_reduce((labels_NBS != -100).sum().float(), mesh.replica_group).clamp(min=1.0)


def sample_numbers(tokens_NBS: Tensor, seen: int, mesh: Mesh) -> Tensor:
    """The numbers in the run, from 0, of this data-parallel rank's samples, int64 (N, B)."""
    rows = tokens_NBS.shape[0] * tokens_NBS.shape[1]
    first = seen + mesh.dp_rank * rows
    return torch.arange(first, first + rows, device=mesh.device).view(tokens_NBS.shape[:2])


def axis_of(axis: Axis, starts: Starts | None) -> Axis:
    """The axis for rows in which packed samples begin there, if they are packed."""
    return replace(axis, attend=attend_apart(starts)) if starts else axis


def judge(state: TrainState, loss: float, norm: float, setup: Setup, bad: Callable[[], str]) -> tuple[bool, bool]:
    """(whether the step counts, whether it is an fp16 overflow that a smaller loss scale may mend).

    bad: names what is not finite. FloatingPointError for a loss or norm that is not finite, unless it is an overflow or
    `on_nan` says skip: rank 0 then warns on stderr.
    """
    config = setup.config
    finite = math.isfinite(norm) and math.isfinite(loss)
    # At the smallest scale it is not the scale that overflows.
    overflow = not finite and config.dtype == "fp16" and state.loss_scale.value > config.min_loss_scale
    if not finite and not overflow:
        problem = f"step {state.step + 1}: loss {loss}, gradient norm {norm}; {bad()}"
        if config.on_nan == "stop":
            raise FloatingPointError(f"{problem}. Lower the learning rate, or give --on-nan skip to leave such steps out")
        if setup.mesh.rank == 0:
            print(f"warning: {problem}; this step is left out", file=sys.stderr)
    return finite, overflow


def advance(state: TrainState, finite: bool, overflow: bool, config: TrainConfig) -> TrainState:
    """The scalars of a state after a step."""
    return replace(
        state,
        loss_scale=next_loss_scale(state.loss_scale, not finite, config) if config.dtype == "fp16" else state.loss_scale,
        step=state.step + 1,
        updates=state.updates + finite,
        samples=state.samples + config.global_batch_size,
        nan_steps=state.nan_steps + (not finite and not overflow),
    )


def gradients(
    params: Tree,
    tokens_NBS: Tensor,
    labels_NBS: Tensor,
    scale: float,
    setup: Setup,
    seen: int = 0,
    starts: Starts | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients (by path, summed over the global batch) of scale x the token-mean loss; and that loss, unscaled.

    They are fp32, but for those of a single micro-batch that nothing is added to, which are as the weights.

    With ZeRO-1 the gradients are of the rows that this rank updates.
    tokens, labels: this data-parallel rank's N micro-batches, (N, B, S); labels are shifted, -100 where no loss is taken.
    seen: samples that the run has seen before these, which dropout depends on.
    starts: of each of the N x B rows, where packed samples begin in it.
    """
    config, mesh = setup.config, setup.mesh
    leaves = {path: p.detach().requires_grad_(path in setup.trainable) for path, p in flatten(params).items()}
    rate, numbers_NB = config.lora_dropout, sample_numbers(tokens_NBS, seen, mesh)
    tokens_NBS, labels_NBS, positions = context_share(tokens_NBS, labels_NBS, mesh, setup.axis)
    count = label_count(labels_NBS, mesh)

    rows = tokens_NBS.shape[1]

    def forward_chunk(tree: Tree, i: int, x: Tensor | None) -> Tensor:
        return forward(
            tree,
            tokens_NBS[i] if x is None else x,
            setup.model,
            axis_of(setup.axis, starts and starts[i * rows : (i + 1) * rows]),
            recompute=cast(Recompute, config.recompute),
            recompute_every=config.recompute_every,
            dropout=Dropout(rate, config.seed, numbers_NB[i], positions) if rate else None,
            head=lambda x, weight: setup.axis.head_loss(x, weight, labels_NBS[i], scale / count),
        )

    wanted = {path: p for path, p in leaves.items() if path in setup.trainable}
    ranks = zero_ranks(mesh, config)
    buckets = make_buckets(wanted, ranks, config.bucket_size) if mesh.replica_group else []
    finish = collect(wanted, len(tokens_NBS), buckets, mesh.replica_rank, mesh.replica_group)
    deferred = Deferred() if config.schedule == "zb-h1" else None
    losses = run_pipeline(
        pipeline_schedule(config.schedule, mesh.pp_rank, mesh.pp, len(tokens_NBS), config.virtual_stages),
        [partial(forward_chunk, deferred.wrap(tree) if deferred else tree) for tree in setup.trees(leaves)],
        list(wanted.values()),
        (tokens_NBS.shape[1], setup.axis.length(tokens_NBS.shape[2]), setup.model.hidden_size),
        next(iter(leaves.values())).dtype,
        mesh,
        deferred,
    )
    grads = finish()
    if mesh.tp_group:
        grads |= {path: g.float() for path, g in grads.items() if setup.table[path].partial_grad}
    all_reduce_buckets([g for path, g in grads.items() if setup.table[path].partial_grad], mesh.tp_group)
    loss = torch.stack(losses).sum() / scale if losses else torch.zeros((), device=mesh.device)
    return grads, all_reduce(all_reduce(loss, mesh.replica_group), mesh.pp_group)


def train_step(
    state: TrainState, tokens_NBS: Tensor, labels_NBS: Tensor, setup: Setup, starts: Starts | None = None
) -> tuple[TrainState, Metrics]:
    """One optimizer step on this rank's micro-batches; weights and moments are updated in place and handed on.

    starts: of each of the N x B rows, where packed samples begin in it.

    FloatingPointError, the same on every rank, for a loss or gradient that is not finite, unless it is an fp16 overflow or
    `on_nan` says skip: rank 0 then warns on stderr.
    """
    config, mesh = setup.config, setup.mesh
    sharded, scale = zero_ranks(mesh, config) > 1, state.loss_scale.value
    grads, loss = gradients(state.params, tokens_NBS, labels_NBS, scale, setup, state.samples, starts)
    norm = gradient_norm(grads, setup.table, mesh, zero=sharded).item() / scale
    finite, overflow = judge(state, loss.item(), norm, setup, lambda: first_bad(state.params, grads, setup.table))
    lr = learning_rate(state.updates + 1, config)
    if finite:
        clip = min(config.clip / (norm + 1e-6), 1.0) if config.clip else 1.0
        weights = {path: p for path, p in flatten(state.params).items() if path in setup.trainable}
        update(updated(weights, mesh, config), grads, state.optimizer, state.updates, lr, config, clip / scale)
        if sharded and mesh.replica_group:
            gather_rows(weights, make_buckets(weights, mesh.replicas, config.bucket_size), mesh.replica_rank, mesh.replica_group)
    return advance(state, finite, overflow, config), Metrics(loss.item(), norm, lr, scale, not finite)
