"""What the processes of the parallel tests do."""

from __future__ import annotations

import torch
from torch import Tensor

from pyalpaca.model import LlamaConfig, flatten, init, lora_parameters, parameters, stage_parameters
from pyalpaca.parallel import init_mesh, tensor_axis
from pyalpaca.train.config import TrainConfig
from pyalpaca.train.optimizer import init_optimizer
from pyalpaca.train.schedule import LossScale
from pyalpaca.train.step import Setup, TrainState, train_step


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


def losses(config: TrainConfig, model: LlamaConfig, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of a training from the seed's initial weights on the seed's random tokens."""
    mesh = init_mesh(config.tp, config.pp)
    table = parameters(model)
    trainable = {p.path for p in table}
    if config.lora_r:
        factors = lora_parameters(table, config.lora_r, config.lora_targets.split(","))
        trainable = {p.path for p in factors} | {"embed", "head"}
        table = table + factors
    table = stage_parameters(table, model.num_layers, mesh.pp_rank, mesh.pp)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.dtype]
    params = init(table, 7, dtype, "cpu", mesh.tp_rank, mesh.tp)
    mine = frozenset(p.path for p in table) & trainable
    setup = Setup(config, model, mesh, tensor_axis(mesh, model.vocab_size), {p.path: p for p in table}, mine)
    optimizer = init_optimizer({k: t for k, t in flatten(params).items() if k in mine})
    scale = LossScale(config.loss_scale, 0, config.hysteresis) if config.dtype == "fp16" else LossScale()
    state = TrainState(params, optimizer, scale)
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
