"""The cache's kept dtype: in the model's own it changes nothing, in less precision the logits stay near, int8 is a quarter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pyalpaca.generate.cache import new_cache
from pyalpaca.generate.engine import Model, generate_ids
from pyalpaca.generate.run import main
from pyalpaca.model import forward

# Of the largest logit. The rounding of int8 is half a step of 1/127 of a row's largest value; of bf16 2^-9.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.int8: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits_stay_near_those_of_one_pass(model: Model, dtype: torch.dtype) -> None:
    tokens = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = forward(model.params, tokens, model.config)
    cache, start, found = new_cache(model.config, 40, dtype, torch.device("cpu"), batch=2), 0, []
    for length in (30, 1, 1, 5, 1, 1, 1):
        layers = [layer._replace(start=start) for layer in cache]
        found.append(forward(model.params, tokens[:, start : start + length], model.config, cache=layers))
        start += length
    error = (torch.cat(found, 1) - expected).abs().max()
    assert error <= TOLERANCE[dtype] * expected.abs().max()
    assert dtype != torch.int8 or error > 0


def test_a_cache_like_the_model_changes_nothing(model: Model) -> None:
    expected = list(generate_ids(model, [1, 5, 9], 12))
    assert list(generate_ids(replace(model, cache_dtype=torch.float32), [1, 5, 9], 12)) == expected


@pytest.mark.parametrize("length", [10, 20000])
def test_a_cache_is_empty_and_a_heads_positions_lie_together(model: Model, length: int) -> None:
    for layer in new_cache(model.config, length, torch.int8, torch.device("cpu")):
        assert layer.k.shape == layer.v.shape == (1, length, model.config.num_kv_heads, model.config.head_dim)
        assert layer.k.stride(1) == model.config.head_dim
        assert layer.k_scales is not None and layer.k_scales.shape == layer.k.shape[:3]
        assert not any(x.any() for x in (layer.k, layer.v, layer.k_scales, layer.v_scales) if x is not None)


def test_the_command_takes_a_cache_dtype(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(folder), "--prompt", "x", "--max-new-tokens", "5"]
    assert main([*flags, "--kv-cache-dtype", "int8"]) == 0
    assert "[5 tokens" in capsys.readouterr().err
