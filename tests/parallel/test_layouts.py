"""The same seed and data give the same losses and gradient norms in every layout."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from launch import launch
from workers import cross_entropy, losses

from pyalpaca.model import ONE_DEVICE, LlamaConfig
from pyalpaca.train.config import TrainConfig

MODEL = LlamaConfig(
    vocab_size=157, hidden_size=64, intermediate_size=96, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=16, norm_eps=1e-5
)
FULL = TrainConfig(micro_batch_size=2, global_batch_size=8, lr=1e-2, steps=6, seq_length=16)
LORA = replace(FULL, lora_r=4)
STEPS = 6


@cache
def reference(config: TrainConfig) -> torch.Tensor:
    return torch.tensor(losses(config, MODEL, STEPS))


def close(found: list[tuple[float, float]], expected: torch.Tensor) -> None:
    """Losses and gradient norms are equal to 1e-5, step by step."""
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("tp", "pp", "world"),
    [
        pytest.param(2, 1, 2, id="tp2"),
        pytest.param(1, 2, 2, id="pp2"),
        pytest.param(1, 1, 2, id="dp2"),
        pytest.param(2, 2, 4, id="tp2 pp2"),
        pytest.param(4, 2, 8, id="tp4 pp2"),
        pytest.param(4, 1, 4, id="tp4", marks=pytest.mark.long),
        pytest.param(1, 4, 4, id="pp4", marks=pytest.mark.long),
        pytest.param(2, 1, 4, id="tp2 dp2", marks=pytest.mark.long),
        pytest.param(1, 2, 4, id="pp2 dp2", marks=pytest.mark.long),
    ],
)
def test_losses_equal_those_of_one_process(tp: int, pp: int, world: int) -> None:
    for found in launch(world, losses, replace(FULL, tp=tp, pp=pp), MODEL, STEPS):
        close(found, reference(FULL))


@pytest.mark.parametrize(
    ("config", "tp", "pp"),
    [
        pytest.param(FULL, 2, 1, id="tp2 sp"),
        pytest.param(FULL, 4, 1, id="tp4 sp"),
        pytest.param(FULL, 2, 2, id="tp2 pp2 sp"),
        pytest.param(replace(FULL, recompute="full"), 2, 1, id="tp2 sp recomputed"),
        pytest.param(replace(FULL, recompute="selective"), 2, 1, id="tp2 sp selective"),
        pytest.param(LORA, 2, 1, id="tp2 sp lora"),
    ],
)
def test_sequence_parallelism_changes_no_loss(config: TrainConfig, tp: int, pp: int) -> None:
    for found in launch(tp * pp, losses, replace(config, tp=tp, pp=pp), MODEL, STEPS, True):
        close(found, reference(config))


@pytest.mark.parametrize(
    ("config", "world"),
    [
        pytest.param(replace(FULL, cp=2), 2, id="cp2"),
        pytest.param(replace(LORA, cp=2, tp=2, lora_dropout=0.2), 4, id="cp2 tp2 lora with dropout"),
        pytest.param(replace(FULL, cp=2, pp=2, recompute="full"), 4, id="cp2 pp2 recomputed"),
        pytest.param(replace(FULL, cp=2, zero=1), 4, id="cp2 dp2 zero1"),
        pytest.param(replace(FULL, cp=3), 3, id="cp3"),
    ],
)
def test_context_parallelism_changes_no_loss(config: TrainConfig, world: int) -> None:
    alone = replace(config, tp=1, cp=1, pp=1, zero=0, recompute="none")
    for found in launch(world, losses, config, MODEL, STEPS):
        close(found, reference(alone))


def test_context_parallelism_keeps_sequence_parallelism_right() -> None:
    for found in launch(4, losses, replace(FULL, cp=2, tp=2), MODEL, STEPS, True):
        close(found, reference(FULL))


def test_the_reference_learns() -> None:
    assert reference(FULL)[-1, 0] != reference(FULL)[0, 0]
    assert reference(LORA)[-1, 0] != reference(FULL)[-1, 0]


def test_lora_with_full_embedding_and_head_gives_the_losses_of_one_process() -> None:
    for found in launch(4, losses, replace(LORA, tp=2, pp=2), MODEL, STEPS):
        close(found, reference(LORA))


def test_recomputation_changes_no_loss() -> None:
    for mode, every in (("full", 1), ("selective", 1), ("full", 3)):
        assert torch.equal(reference(replace(FULL, recompute=mode, recompute_every=every)), reference(FULL))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_follows_fp32(dtype: str) -> None:
    torch.testing.assert_close(
        reference(replace(FULL, dtype=dtype, lr=1e-3)), reference(replace(FULL, lr=1e-3)), atol=0, rtol=0.05
    )


def test_cross_entropy_over_two_ranks_equals_one() -> None:
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0)) * 20
    labels = torch.tensor([[0, 4, 5], [10, -100, 7]])
    whole = logits.clone().requires_grad_()
    expected = ONE_DEVICE.cross_entropy(whole, labels)
    expected.sum().backward()
    assert whole.grad is not None
    parts = launch(2, cross_entropy, logits, labels)
    for loss, _ in parts:
        torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad in parts], -1), whole.grad)
