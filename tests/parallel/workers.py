"""What the processes of the parallel tests do."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyalpaca.checkpoint import memory_reader
from pyalpaca.model import LlamaConfig, flatten, init, parameters
from pyalpaca.parallel import init_mesh, sequence_parameters, tensor_axis
from pyalpaca.train import TrainConfig
from pyalpaca.train.loop import plan, start
from pyalpaca.train.step import train_step


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of this rank's columns, by the tensor-parallel cross entropy."""
    mesh = init_mesh(tp=2)
    axis = tensor_axis(mesh, logits.shape[-1])
    columns = logits.tensor_split([logits.shape[-1] // 2], -1)[mesh.tp_rank].clone().requires_grad_()
    loss = axis.cross_entropy(columns, labels)
    loss.sum().backward()
    assert columns.grad is not None
    assert torch.equal(axis.gather_logits(columns.detach()), logits)
    return loss.detach(), columns.grad


def losses(config: TrainConfig, model: LlamaConfig, steps: int, sequence_parallel: bool = False) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of a training from the seed's initial weights on the seed's random tokens.

    Samples have 11 tokens, which no tensor-parallel size divides.
    """
    mesh = init_mesh(config.tp, config.pp)
    setup = plan(model, config, mesh)
    if sequence_parallel:
        table = {p.path: p for p in sequence_parameters(setup.table.values())}
        setup = replace(setup, axis=tensor_axis(mesh, model.vocab_size, sequence_parallel=True), table=table)
    whole = flatten(init(parameters(model), seed=7))
    state = start(config, setup, memory_reader(model, {p.name: whole[p.path] for p in parameters(model)}))
    found = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        text = torch.randint(model.vocab_size, (config.global_batch_size, 12), generator=generator)
        tokens, labels = text[:, :-1], text[:, 1:].clone()
        labels[::3, :5] = -100
        rows = config.global_batch_size // mesh.dp
        part = slice(mesh.dp_rank * rows, (mesh.dp_rank + 1) * rows)
        shape = (-1, config.micro_batch_size, tokens.shape[1])
        state, metrics = train_step(state, tokens[part].reshape(shape), labels[part].reshape(shape), setup)
        found.append((metrics.loss, metrics.grad_norm))
    return found
