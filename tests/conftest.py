"""What several rooms' tests share: a tiny model."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from pyalpaca.model import LlamaConfig, Tree, init, parameters

# The tensors here are too small for a second thread to help, and on a busy machine it costs much.
torch.set_num_threads(1)


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


@pytest.fixture
def tiny_params(tiny: LlamaConfig) -> Tree:
    return init(parameters(tiny), seed=1)
