"""One real training step under observation, and the plan of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from memory_watch import MemoryWatch

from pyalpaca.checkpoint import memory_reader
from pyalpaca.model import LlamaConfig, flatten, forward, init, parameters, unflatten
from pyalpaca.parallel import Traffic, count_traffic, init_mesh
from pyalpaca.train import TrainConfig
from pyalpaca.train.engine import open_engine
from pyalpaca.train.loop import plan, start
from pyalpaca.train.step import Setup, TrainState, axis_of, train_step

# Wide enough that tokens, and not what is constant, fill the memory; MANY_WORDS is almost only embedding and head.
WIDE = LlamaConfig(512, 192, 512, 5, 8, 4, 24)
MANY_WORDS = LlamaConfig(8192, 96, 256, 3, 4, 4, 24)


@dataclass(frozen=True)
class Observed:
    """Bytes: of weights and optimizer before a step, and of the most that was alive during it."""

    before: int
    peak: int


def begin(config: TrainConfig, model: LlamaConfig) -> tuple[TrainState, Setup, torch.Tensor]:
    """The first state of a run, and this rank's tokens of one step."""
    mesh = init_mesh(config.tp, config.pp, cp=config.cp)
    setup = plan(model, config, mesh)
    whole = flatten(init(parameters(model), seed=7))
    state = start(config, setup, memory_reader(model, {p.name: whole[p.path] for p in parameters(model)}))
    shape = (config.global_batch_size // mesh.dp // config.micro_batch_size, config.micro_batch_size, config.seq_length)
    return state, setup, torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def observe(config: TrainConfig, model: LlamaConfig) -> Observed:
    """One step of a run on this process's rank."""
    return watched_step(*begin(config, model))


def watched_step(state: TrainState, setup: Setup, tokens: torch.Tensor) -> Observed:
    """One step from a state."""
    held = [*flatten(state.params).values(), *(t for part in state.optimizer for t in part.values())]
    with MemoryWatch([*held, tokens]) as watch:
        before = watch.alive - tokens.nbytes
        train_step(state, tokens, tokens.clone(), setup)
    return Observed(before, watch.peak)


def head_loss(setup: Setup, labels: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return setup.axis.head_loss(x, weight, labels, 1.0)


def kept(config: TrainConfig, model: LlamaConfig) -> int:
    """Bytes that the forward pass of one micro-batch leaves behind for the backward pass, on one device."""
    state, setup, tokens = begin(config, model)
    leaves = {path: p.requires_grad_(path in setup.trainable) for path, p in flatten(state.params).items()}
    labels = tokens[0].clone()
    with MemoryWatch([*leaves.values(), tokens, labels]) as watch:
        before = watch.alive
        how = {"recompute": config.recompute, "recompute_every": config.recompute_every}
        starts = [(0, 40, 90)] * config.micro_batch_size if config.pack else None
        head = partial(head_loss, setup, labels)
        loss = forward(unflatten(leaves), tokens[0], setup.model, axis_of(setup.axis, starts), head=head, **how)  # type: ignore[arg-type]
        found = watch.alive - before
    assert loss.requires_grad
    return found


def layout_step(config: TrainConfig, model: LlamaConfig) -> tuple[Traffic, Observed]:
    """What this rank of a layout moves in one step, and the memory that another one takes."""
    state, setup, tokens = begin(config, model)
    with count_traffic(setup.mesh) as moved:
        state, _ = train_step(state, tokens, tokens.clone(), setup)
    return moved, watched_step(state, setup, tokens)


def layout_steps(cases: Sequence[tuple[TrainConfig, LlamaConfig]]) -> list[tuple[Traffic, Observed]]:
    """The same for several layouts of as many processes, one after the other."""
    return [layout_step(*case) for case in cases]


def deepspeed_steps(runs: Sequence[TrainConfig], model: LlamaConfig) -> list[Traffic]:
    """What this rank moves in the second step of each run, which DeepSpeed has begun to know."""
    os.environ.update(LOCAL_RANK="0", LOCAL_SIZE="2")
    found = []
    for config in runs:
        state, setup, tokens = begin(config, model)
        engine, state = open_engine(state, setup)
        state, _ = engine.step(state, tokens, tokens.clone(), setup, None)
        with count_traffic(setup.mesh) as moved:
            engine.step(state, tokens, tokens.clone(), setup, None)
        found.append(dict(moved))
    return found
