"""One training step: state, batch -> state, metrics. The same for one process and for any mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyalpaca.model import Axis, LlamaConfig, Parameter, Tree, flatten, forward, unflatten
from pyalpaca.parallel import Mesh, all_reduce, all_reduce_buckets, gather_objects, one_f_one_b, run_pipeline
from pyalpaca.train.config import TrainConfig
from pyalpaca.train.optimizer import OptimizerState, gradient_norm, update
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
    """What stays the same during a run. table: this stage's parameters by path; trainable: the paths that learn."""

    config: TrainConfig
    model: LlamaConfig
    mesh: Mesh
    axis: Axis
    table: Mapping[str, Parameter]
    trainable: frozenset[str]


@dataclass(frozen=True)
class Metrics:
    """What a step reports: the token mean of the loss over the global batch, and the scalars around it."""

    loss: float
    grad_norm: float
    learning_rate: float
    loss_scale: float
    skipped: bool


def gradients(
    params: Tree, tokens_NBS: Tensor, labels_NBS: Tensor, scale: float, setup: Setup
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients (fp32, by path, summed over the global batch) of scale x the token-mean loss; and that loss, unscaled.

    tokens, labels: this data-parallel rank's N micro-batches, (N, B, S); labels are shifted, -100 where no loss is taken.
    """
    mesh = setup.mesh
    leaves = {path: p.detach().requires_grad_(path in setup.trainable) for path, p in flatten(params).items()}
    tree = unflatten(leaves)
    count = all_reduce((labels_NBS != -100).sum().float(), mesh.dp_group).clamp(min=1.0)

    def forward_stage(i: int, x: Tensor | None) -> Tensor:
        y = forward(tree, tokens_NBS[i] if x is None else x, setup.model, setup.axis, recompute=setup.config.recompute == "full")
        return setup.axis.cross_entropy(y, labels_NBS[i]).sum() * (scale / count) if mesh.last_stage else y

    wanted = {path: p for path, p in leaves.items() if path in setup.trainable}
    found, losses = run_pipeline(
        one_f_one_b(mesh.pp_rank, mesh.pp, len(tokens_NBS)),
        forward_stage,
        list(wanted.values()),
        (tokens_NBS.shape[1], setup.axis.length(tokens_NBS.shape[2]), setup.model.hidden_size),
        next(iter(leaves.values())).dtype,
        mesh,
    )
    grads = dict(zip(wanted, found, strict=True))
    all_reduce_buckets([g for path, g in grads.items() if setup.table[path].partial_grad], mesh.tp_group)
    all_reduce_buckets(grads.values(), mesh.dp_group)
    loss = torch.stack(losses).sum() / scale if losses else torch.zeros((), device=mesh.device)
    return grads, all_reduce(all_reduce(loss, mesh.dp_group), mesh.pp_group)


def train_step(state: TrainState, tokens_NBS: Tensor, labels_NBS: Tensor, setup: Setup) -> tuple[TrainState, Metrics]:
    """One optimizer step on this rank's micro-batches; weights and moments are updated in place and handed on.

    FloatingPointError for a loss or gradient that is not finite, unless it is an fp16 overflow or `on_nan` says skip.
    """
    config = setup.config
    scale = state.loss_scale.value
    grads, loss = gradients(state.params, tokens_NBS, labels_NBS, scale, setup)
    torch._foreach_div_(list(grads.values()), scale)
    norm = gradient_norm(grads, setup.table, setup.mesh)
    finite = bool(torch.isfinite(norm)) and bool(torch.isfinite(loss))
    # At the smallest scale it is not the scale that overflows.
    overflow = not finite and config.dtype == "fp16" and scale > config.min_loss_scale
    if not finite and not overflow and config.on_nan == "stop":
        found = gather_objects(next((path for path, g in grads.items() if not g.isfinite().all()), None))
        bad = next(filter(None, found), "none")
        raise FloatingPointError(
            f"step {state.step + 1}: loss {loss.item()}, gradient norm {norm.item()}; first gradient that is not finite: {bad}. "
            "Lower the learning rate, or give --on-nan skip to leave such steps out"
        )
    lr = learning_rate(state.updates + 1, config)
    if finite:
        if config.clip:
            torch._foreach_mul_(list(grads.values()), (config.clip / (norm + 1e-6)).clamp(max=1.0))
        weights = {path: p for path, p in flatten(state.params).items() if path in setup.trainable}
        update(weights, grads, state.optimizer, state.updates, lr, config)
    new = replace(
        state,
        loss_scale=next_loss_scale(state.loss_scale, not finite, config) if config.dtype == "fp16" else state.loss_scale,
        step=state.step + 1,
        updates=state.updates + finite,
        samples=state.samples + config.global_batch_size,
        nan_steps=state.nan_steps + (not finite and not overflow),
    )
    return new, Metrics(loss.item(), norm.item(), lr, scale, not finite)
