"""Learning rate and loss scale: the published values of the two recipes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pyalpaca.train import TrainConfig
from pyalpaca.train.schedule import LossScale, learning_rate, next_loss_scale

TP4_PP2 = TrainConfig(lr=1e-4, min_lr=1e-5, lr_decay_steps=320000, warmup_fraction=0.01)
DEEPSPEED = TrainConfig(lr=1e-6, min_lr=0.0, steps=3000, warmup_steps=200)


def test_the_first_rates_of_the_published_recipes() -> None:
    assert f"{learning_rate(1, TP4_PP2):.3E}" == "3.125E-08"
    assert f"{learning_rate(1, DEEPSPEED):.3E}" == "5.000E-09"


def test_warmup_ends_at_the_highest_rate_and_the_decay_at_the_lowest() -> None:
    assert learning_rate(3200, TP4_PP2) == pytest.approx(1e-4)
    assert learning_rate(320000, TP4_PP2) == pytest.approx(1e-5)
    assert learning_rate(400000, TP4_PP2) == pytest.approx(1e-5)
    middle = (3200 + 320000) // 2
    assert learning_rate(middle, TP4_PP2) == pytest.approx((1e-4 + 1e-5) / 2)


def test_linear_and_constant_decay() -> None:
    config = TrainConfig(lr=1.0, min_lr=0.5, steps=10, warmup_steps=2, lr_schedule="linear")
    assert [learning_rate(n, config) for n in (1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 0.75, 0.5])
    assert learning_rate(10, replace(config, lr_schedule="constant")) == 1.0


def test_without_warmup_the_first_step_has_nearly_the_highest_rate() -> None:
    assert learning_rate(1, TrainConfig(lr=1.0, steps=1000)) == pytest.approx(1.0, abs=1e-5)


def test_overflows_halve_the_scale_when_the_tracker_is_used_up() -> None:
    config = TrainConfig(dtype="fp16", loss_scale=4096.0, hysteresis=2)
    scale, seen = LossScale(4096.0, 0, 2), []
    for _ in range(3):
        scale = next_loss_scale(scale, True, config)
        seen.append(scale.value)
    assert seen == [4096, 2048, 1024]
    for _ in range(20):
        scale = next_loss_scale(scale, True, config)
    assert scale.value == config.min_loss_scale == 1.0


def test_clean_steps_double_the_scale_and_refill_the_tracker() -> None:
    config = TrainConfig(dtype="fp16", loss_scale_window=3, hysteresis=2)
    scale = next_loss_scale(LossScale(1024.0, 2, 2), True, config)
    assert scale == LossScale(1024.0, 0, 1)
    for clean in (1, 2):
        scale = next_loss_scale(scale, False, config)
        assert scale == LossScale(1024.0, clean, 1)
    scale = next_loss_scale(scale, False, config)
    assert scale == LossScale(2048.0, 0, 2)
    assert next_loss_scale(scale, True, config).value == 2048.0


def test_a_run_that_resumes_with_a_shorter_window_still_doubles() -> None:
    assert next_loss_scale(LossScale(8.0, 500, 2), False, TrainConfig(loss_scale_window=100)).value == 16.0
