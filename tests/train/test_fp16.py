"""fp16: the loss scale against torch's own, and an overflow that one rank alone has seen."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch import launch
from test_step import CONFIG, data, weights
from train_makers import MODEL

from pyalpaca.checkpoint import memory_reader
from pyalpaca.model import flatten, init, parameters
from pyalpaca.parallel import init_mesh
from pyalpaca.train import TrainConfig, step
from pyalpaca.train.loop import plan, start
from pyalpaca.train.schedule import LossScale, next_loss_scale

FP16 = replace(CONFIG, dtype="fp16", loss_scale=4096.0, hysteresis=2, warmup_steps=5)


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5))
def test_without_hysteresis_the_scale_is_that_of_torchs_scaler(overflows: list[bool], window: int) -> None:
    config = TrainConfig(dtype="fp16", loss_scale=1024.0, hysteresis=1, loss_scale_window=window, min_loss_scale=2.0**-80)
    ours = LossScale(1024.0, 0, 1)
    theirs, growth = torch.tensor(1024.0), torch.tensor(0, dtype=torch.int32)
    for overflow in overflows:
        ours = next_loss_scale(ours, overflow, config)
        torch._amp_update_scale_(theirs, growth, torch.tensor(float(overflow)), 2.0, 0.5, window)
        assert ours.value == theirs.item() and ours.clean == growth.item()


def steps(layouts: list[TrainConfig], culprits: list[int], overflows: tuple[bool, ...]) -> list[Any]:
    """For each layout and culprit: (scale, updates, learning rate, skipped) of each step, where the culprit alone overflows."""
    whole = flatten(init(parameters(MODEL), seed=3))
    plain, spoil = step.gradients, False

    def overflowing(*args: Any) -> Any:
        grads, loss = plain(*args)
        if spoil:
            next(iter(grads.values())).view(-1)[0] = float("inf")
        return grads, loss

    step.gradients = overflowing
    found = []
    for config, culprit in itertools.product(layouts, culprits):
        mesh = init_mesh(config.tp, config.pp)
        setup = plan(MODEL, config, mesh)
        state = start(config, setup, memory_reader(MODEL, {p.name: whole[p.path] for p in parameters(MODEL)}))
        rows = config.global_batch_size // mesh.dp
        tokens, labels = (x.reshape(4, -1)[mesh.dp_rank * rows :][:rows].reshape(-1, 1, x.shape[-1]) for x in data())
        seen = []
        for overflow in overflows:
            spoil, before = overflow and mesh.rank == culprit, weights(state)
            state, metrics = step.train_step(state, tokens, labels, setup)
            assert all(torch.equal(t, before[path]) for path, t in weights(state).items()) == overflow
            seen.append((state.loss_scale.value, state.updates, metrics.learning_rate, metrics.skipped))
        found.append(seen)
    return found


@pytest.mark.parametrize("zero", [0, 1])
def test_an_overflow_on_one_rank_is_every_ranks(zero: int) -> None:
    base = replace(FP16, micro_batch_size=1, zero=zero)
    # Without ZeRO data-parallel ranks have one and the same gradient; what one has, all have.
    layouts = [replace(base, tp=2, pp=2)] if not zero else [replace(base, tp=2), base]
    overflows = (True, True, False, True, False)
    rate = base.lr / 5
    expected = [
        (4096.0, 0, rate, True),  # hysteresis 2: the first overflow only uses the tracker up
        (2048.0, 0, rate, True),
        (2048.0, 1, rate, False),
        (1024.0, 1, pytest.approx(2 * rate), True),  # a skipped step does not advance the rate
        (1024.0, 2, pytest.approx(2 * rate), False),
    ]
    for rank in launch(4, steps, layouts, [0, 3], overflows):
        assert len(rank) == 2 * len(layouts)
        for seen in rank:
            assert seen == expected
