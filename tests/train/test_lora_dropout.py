"""LoRA dropout in training: the same masks in every layout, and the same after a run has stopped and gone on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from train_makers import MODEL, losses, records, settings, train_all
from workers import all_losses

from pyalpaca.checkpoint import digest, open_checkpoint
from pyalpaca.train import TrainConfig, train

ONE = TrainConfig(micro_batch_size=2, global_batch_size=8, lr=2e-2, steps=4, seq_length=16, lora_r=4, lora_dropout=0.3)
LAYOUTS = {
    "tp2 dp2": replace(ONE, tp=2),
    "tp2 sp dp2": replace(ONE, tp=2, recompute="selective", sequence_parallel=True),
    "pp2 dp2": replace(ONE, pp=2, recompute="full"),
    "pp2 zb dp2": replace(ONE, pp=2, recompute="selective", schedule="zb-h1"),
    "tp2 pp2": replace(ONE, tp=2, pp=2),
    "dp4 zero1": replace(ONE, zero=1),
    "dp4 micro-batches of 1": replace(ONE, micro_batch_size=1, recompute="selective"),
}


def test_every_layout_drops_the_same() -> None:
    (alone,), (other,), (without,) = (
        all_losses([config], MODEL, ONE.steps) for config in (ONE, replace(ONE, seed=7), replace(ONE, lora_dropout=0.0))
    )
    assert alone[0] != without[0] and alone[1] != other[1]
    for rank in launch(4, all_losses, list(LAYOUTS.values()), MODEL, ONE.steps):
        for name, found in zip(LAYOUTS, rank, strict=True):
            torch.testing.assert_close(
                torch.tensor(found), torch.tensor(alone), atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_is_bit_identical_and_another_layout_goes_on(road: Path, tmp_path: Path, dtype: str) -> None:
    usual: dict[str, Any] = {"lora_r": 2, "lora_dropout": 0.2, "dtype": dtype, "lr_decay_steps": 6, "lr": 2e-2}
    train(settings(road, tmp_path / "never", steps=6, **usual))
    for name in ("stopped", "elsewhere"):
        train(settings(road, tmp_path / name, steps=3, **usual))
    train(settings(road, tmp_path / "stopped", steps=6, resume=True, **usual))
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in records(tmp_path / "stopped")] == [r[key] for r in records(tmp_path / "never")]
    assert digest(open_checkpoint(tmp_path / "stopped")) == digest(open_checkpoint(tmp_path / "never"))
    if dtype == "fp32":
        launch(2, train_all, [settings(road, tmp_path / "elsewhere", steps=6, resume=True, tp=2, **usual)])
        assert losses(tmp_path / "elsewhere") == pytest.approx(losses(tmp_path / "never"), abs=1e-5)


def test_every_step_draws_anew() -> None:
    """With a learning rate of 0 and one batch again and again, only the masks can change the loss."""
    still = replace(ONE, lr=0.0, lora_full="", steps=3)
    assert len({loss for loss, _ in repeated(still)}) == 1  # B is 0 at first: what A gets does not show
    assert len({norm for _, norm in repeated(still)}) == 3
    assert len({norm for _, norm in repeated(replace(still, lora_dropout=0.0))}) == 1


def repeated(config: TrainConfig) -> list[tuple[float, float]]:
    from test_step import begin, data

    from pyalpaca.train.step import train_step

    state, setup = begin(config)
    found = []
    for _ in range(config.steps):
        state, metrics = train_step(state, *data(), setup)
        found.append((metrics.loss, metrics.grad_norm))
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout is given without lora_r"),
        ({"lora_dropout": 1.0, "lora_r": 2}, "lora_dropout is 1.0, expected less than 1"),
        ({"lora_dropout": -0.1, "lora_r": 2}, "lora_dropout is -0.1, expected at least 0"),
    ],
)
def test_a_share_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)
