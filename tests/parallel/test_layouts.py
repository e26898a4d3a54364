"""The table of layouts: the same seed and data give the same losses and gradient norms in every one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from workers import all_losses, head_loss

from pyalpaca.model import LlamaConfig
from pyalpaca.train.config import TrainConfig

# None of 2, 3 and 4 divides the vocabulary, nor the samples' 11 tokens.
MODEL = LlamaConfig(
    vocab_size=157, hidden_size=64, intermediate_size=96, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=16, norm_eps=1e-5
)
FULL = TrainConfig(micro_batch_size=2, global_batch_size=8, lr=1e-2, steps=6, seq_length=16)
LORA = replace(FULL, lora_r=4)
STEPS = 3

Row = tuple[int, dict[str, Any]]

# A name, how many processes, and what its settings have beside those of one process.
LAYOUTS: dict[str, Row] = {
    "tp2": (2, {"tp": 2}),
    "tp4": (4, {"tp": 4}),
    "tp2 sp": (2, {"tp": 2, "sequence_parallel": True}),
    "tp4 sp": (4, {"tp": 4, "sequence_parallel": True}),
    "tp2 sp recomputed": (2, {"tp": 2, "sequence_parallel": True, "recompute": "full"}),
    "tp2 sp selective": (2, {"tp": 2, "sequence_parallel": True, "recompute": "selective"}),
    "pp2": (2, {"pp": 2}),
    "pp4": (4, {"pp": 4}),
    "pp2 uneven": (2, {"pp": 2, "layers_per_stage": "1,3"}),
    "pp2 interleaved": (2, {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}),
    "pp2 zb-h1": (2, {"pp": 2, "schedule": "zb-h1"}),
    "pp2 zb-h1 recomputed": (2, {"pp": 2, "schedule": "zb-h1", "recompute": "full"}),
    "pp2 zb-h1 selective": (2, {"pp": 2, "schedule": "zb-h1", "recompute": "selective"}),
    "pp4 zb-h1": (4, {"pp": 4, "schedule": "zb-h1"}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "tp2 sp pp2": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    "tp2 sp pp2 zb-h1": (4, {"tp": 2, "pp": 2, "sequence_parallel": True, "schedule": "zb-h1"}),
    "tp2 pp2 interleaved": (4, {"tp": 2, "pp": 2, "schedule": "interleaved", "virtual_stages": 2}),
    "tp4 pp2": (8, {"tp": 4, "pp": 2}),
    "dp2": (2, {}),
    "dp2 zero1": (2, {"zero": 1}),
    "cp2": (2, {"cp": 2}),
    "cp2 sp tp2": (4, {"cp": 2, "tp": 2, "sequence_parallel": True}),
    "cp2 pp2 recomputed": (4, {"cp": 2, "pp": 2, "recompute": "full"}),
    "cp2 pp2 zb-h1": (4, {"cp": 2, "pp": 2, "schedule": "zb-h1"}),
    "cp2 dp2 zero1": (4, {"cp": 2, "zero": 1}),
    "cp3": (3, {"cp": 3}),
    "tp2 dp2": (4, {"tp": 2}),
    "tp2 sp dp2 zero1": (4, {"tp": 2, "sequence_parallel": True, "zero": 1}),
    "pp2 dp2": (4, {"pp": 2}),
    "pp2 zb-h1 dp2 zero1": (4, {"pp": 2, "schedule": "zb-h1", "zero": 1}),
    "pp2 interleaved dp2 zero1": (4, {"pp": 2, "schedule": "interleaved", "virtual_stages": 2, "zero": 1}),
}


@cache
def alone(config: TrainConfig) -> torch.Tensor:
    return torch.tensor(all_losses([config], MODEL, STEPS)[0])


def hold(rows: dict[str, Row], base: TrainConfig) -> None:
    """Losses and gradient norms of every row are those of one process to 1e-5, step by step, on every rank."""
    for world in sorted({world for world, _ in rows.values()}):
        names = [name for name, (processes, _) in rows.items() if processes == world]
        for found in launch(world, all_losses, [replace(base, **rows[name][1]) for name in names], MODEL, STEPS):
            for name, seen in zip(names, found, strict=True):
                say: Callable[[str], str] = lambda message, name=name: f"{name}: {message}"  # noqa: E731
                torch.testing.assert_close(torch.tensor(seen), alone(base), atol=1e-5, rtol=1e-5, msg=say)


def test_every_layout_has_the_losses_of_one_process() -> None:
    hold(LAYOUTS, FULL)


def test_every_layout_has_them_with_lora_too() -> None:
    """Factors, embedding and head learn; all else is frozen."""
    names = ("tp2 sp", "pp2 zb-h1", "pp2 zb-h1 recomputed", "tp2 pp2", "tp2 sp pp2 zb-h1", "pp2 interleaved dp2 zero1")
    hold({name: LAYOUTS[name] for name in names}, LORA)
    hold({name: LAYOUTS[name] for name in ("cp2", "cp2 sp tp2")}, replace(LORA, lora_dropout=0.2))


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_has_them_too(tmp_path: Path) -> None:
    rows = {}
    for stage in (2, 3):
        file = tmp_path / f"{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        rows[f"deepspeed 2 zero{stage}"] = (2, {"engine": "deepspeed", "deepspeed_config": str(file)})
    hold(rows, FULL)


def test_the_reference_learns() -> None:
    assert alone(FULL)[-1, 0] != alone(FULL)[0, 0]
    assert alone(LORA)[-1, 0] != alone(FULL)[-1, 0]


def test_recomputation_changes_no_loss() -> None:
    for mode, every in (("full", 1), ("selective", 1), ("full", 3)):
        assert torch.equal(alone(replace(FULL, recompute=mode, recompute_every=every)), alone(FULL))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_follows_fp32(dtype: str) -> None:
    torch.testing.assert_close(alone(replace(FULL, dtype=dtype, lr=1e-3)), alone(replace(FULL, lr=1e-3)), atol=0, rtol=0.05)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_loss_of_two_ranks_with_parts_of_the_vocabulary_equals_one(sequence_parallel: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 8, generator=generator), torch.randn(11, 8, generator=generator) * 5
    labels = torch.tensor([[0, 4, 5], [10, -100, 7]])
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy((leaves[0] @ leaves[1].T).flatten(0, 1), labels.flatten(), reduction="sum") * 0.5
    expected.backward()
    parts = launch(2, head_loss, x, weight, labels, sequence_parallel)
    for loss, dx, _ in parts:
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(dx if not sequence_parallel else sum(grad for _, grad, _ in parts), leaves[0].grad)
    torch.testing.assert_close(torch.cat([grad for *_, grad in parts]), leaves[1].grad)
