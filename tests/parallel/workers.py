"""What the processes of the parallel tests do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pyalpaca.checkpoint import memory_reader
from pyalpaca.model import LlamaConfig, Tree, flatten, forward, init, parameters, unflatten
from pyalpaca.model.sharding import chunk_parameters
from pyalpaca.parallel import (
    all_reduce_buckets,
    init_mesh,
    ring_attention,
    ring_positions,
    run_pipeline,
    sequence_parameters,
    tensor_axis,
)
from pyalpaca.parallel.deferred import Deferred
from pyalpaca.parallel.schedule import pipeline_schedule
from pyalpaca.train import TrainConfig
from pyalpaca.train.engine import open_engine
from pyalpaca.train.loop import plan, start


def head_loss(x: Tensor, weight: Tensor, labels: Tensor, sequence_parallel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the gradients of x and of this rank's rows of the head, by the tensor-parallel head."""
    mesh = init_mesh(tp=2)
    axis = tensor_axis(mesh, len(weight), sequence_parallel)
    x = x.clone().requires_grad_()
    rows = weight.tensor_split([len(weight) // 2])[mesh.tp_rank].clone().requires_grad_()
    stream = torch.nn.functional.pad(x, (0, 0, 0, axis.length(x.shape[1]) * axis.pieces - x.shape[1]))
    loss = axis.head_loss(axis.enter(stream.chunk(axis.pieces, 1)[mesh.tp_rank % axis.pieces]), rows, labels, 0.5)
    loss.backward()
    assert x.grad is not None and rows.grad is not None
    assert torch.equal(axis.gather_logits(x.detach() @ rows.detach().T), x.detach() @ weight.T)
    return loss.detach(), x.grad, rows.grad


def losses(config: TrainConfig, model: LlamaConfig, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of a training from the seed's initial weights on the seed's random tokens.

    Samples have 11 tokens, which no tensor-parallel size divides.
    """
    mesh = init_mesh(config.tp, config.pp, cp=config.cp)
    setup = plan(model, config, mesh)
    whole = flatten(init(parameters(model), seed=7))
    state = start(config, setup, memory_reader(model, {p.name: whole[p.path] for p in parameters(model)}))
    engine, state = open_engine(state, setup)
    found = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        text = torch.randint(model.vocab_size, (config.global_batch_size, 12), generator=generator)
        tokens, labels = text[:, :-1], text[:, 1:].clone()
        labels[::3, :5] = -100
        rows = config.global_batch_size // mesh.dp
        part = slice(mesh.dp_rank * rows, (mesh.dp_rank + 1) * rows)
        shape = (-1, config.micro_batch_size, tokens.shape[1])
        state, metrics = engine.step(state, tokens[part].reshape(shape), labels[part].reshape(shape), setup)
        found.append((metrics.loss, metrics.grad_norm))
    return found


def all_losses(configs: Sequence[TrainConfig], model: LlamaConfig, steps: int) -> list[list[tuple[float, float]]]:
    return [losses(config, model, steps) for config in configs]


def descend(
    schedule_name: str,
    model: LlamaConfig,
    tp: int = 1,
    pp: int = 1,
    chunks: int = 1,
    counts: tuple[int, ...] = (),
    sequence_parallel: bool = False,
    steps: int = 3,
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a plain gradient descent by the schedule, and in the end this rank's weights."""
    mesh = init_mesh(tp, pp)
    axis = tensor_axis(mesh, model.vocab_size, sequence_parallel)
    table = parameters(model)
    if sequence_parallel:
        table = sequence_parameters(table)
    parts = chunk_parameters(table, model.num_layers, mesh.pp_rank, pp, chunks, counts)
    mine = {p.path: p for part in parts for p in part}
    weights = flatten(init(mine.values(), 7, rank=mesh.tp_rank, ranks=tp))
    for leaf in weights.values():
        leaf.requires_grad_()
    deferred = Deferred() if schedule_name == "zb-h1" else None
    found = []
    for step in range(steps):
        text = torch.randint(model.vocab_size, (4, 2, 12), generator=torch.Generator().manual_seed(step))
        tokens, labels = text[..., :-1], text[..., 1:]

        def stage(tree: Tree, i: int, x: Tensor | None, tokens: Tensor = tokens, labels: Tensor = labels) -> Tensor:
            def token_mean(x: Tensor, weight: Tensor) -> Tensor:
                return axis.head_loss(x, weight, labels[i], 1 / labels.numel())

            return forward(tree, tokens[i] if x is None else x, model, axis, head=token_mean)

        trees = [unflatten({p.path: weights[p.path] for p in part}) for part in parts]
        losses = run_pipeline(
            pipeline_schedule(schedule_name, mesh.pp_rank, pp, 4, chunks),
            [partial(stage, deferred.wrap(tree) if deferred else tree) for tree in trees],
            list(weights.values()),
            (2, axis.length(tokens.shape[-1]), model.hidden_size),
            torch.float32,
            mesh,
            deferred,
        )
        found.append(sum((loss.item() for loss in losses), 0.0))
        all_reduce_buckets(
            [w.grad for path, w in weights.items() if w.grad is not None and mine[path].partial_grad], mesh.tp_group
        )
        with torch.no_grad():
            for w in weights.values():
                assert w.grad is not None
                w -= w.grad
                w.grad = None
    return found, {path: w.detach() for path, w in weights.items()}


def ring(cases: list[list[Tensor]]) -> list[tuple[Tensor, ...]]:
    """Of each case (q, k, v, dout) this rank's positions of the output and the gradients of q, k, v."""
    mesh = init_mesh(cp=int(os.environ["WORLD_SIZE"]))
    assert mesh.cp_group is not None
    found = []
    for case in cases:
        at = ring_positions(case[0].shape[1], mesh.cp_rank, mesh.cp)
        q, k, v, dout = (x[:, at].clone().requires_grad_() for x in case)
        out = ring_attention(q, k, v, mesh.cp_group)
        out.backward(dout.detach())
        found.append(tuple(x.detach() for x in (out, *(x.grad for x in (q, k, v) if x.grad is not None))))
    return found
