"""What several rooms' tests share: a tiny model and its transformers twin."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from pyalpaca.model import LlamaConfig, Tree, flatten, init, parameters

torch.set_num_threads(2)


@pytest.fixture
def tiny() -> LlamaConfig:
    """Two layers, grouped-query attention, a vocabulary that 8 does not divide."""
    return LlamaConfig(
        vocab_size=157,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        norm_eps=1e-5,
    )


def transformers_twin(config: LlamaConfig, params: Tree):
    """transformers' LlamaForCausalLM with the same weights, fp32, in evaluation mode."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    from pyalpaca.model import config_to_hf

    model = LlamaForCausalLM(HFConfig(**config_to_hf(config, "float32"), attn_implementation="eager")).eval()
    paths = {p.path: p.name for p in parameters(config)}
    with torch.no_grad():
        for path, value in flatten(params).items():
            model.get_parameter(paths[path]).copy_(value)
    return model


@pytest.fixture
def tiny_params(tiny: LlamaConfig) -> Tree:
    return init(parameters(tiny), seed=1)
