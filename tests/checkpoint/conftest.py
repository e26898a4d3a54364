"""Fixtures of the checkpoint room: tokenizers are trained once, the usual two adapters and their base are made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoint_makers import ALPACA_VOCAB, BASE_VOCAB, PLUS_VOCAB, add_pad, make_adapter, make_hf, make_tokenizer, model


@dataclass(frozen=True)
class Road:
    """What a user starts from: a base in Hugging Face format and the two adapters of the Plus recipe."""

    base: Path
    plus: Path
    alpaca: Path
    base_tokenizer: Path
    plus_tokenizer: Path


@pytest.fixture(scope="session")
def road(tmp_path_factory) -> Road:
    root = tmp_path_factory.mktemp("road")
    small = make_tokenizer(root / "small", BASE_VOCAB)
    large = make_tokenizer(root / "large", PLUS_VOCAB)
    base = make_hf(root / "base", model(tokenizer=small), weights="bin", max_shard_size="60KB")
    plus = make_adapter(root / "plus", vocab=PLUS_VOCAB, tokenizer=large, seed=1)
    alpaca = make_adapter(
        root / "alpaca", r=2, alpha=5, vocab=ALPACA_VOCAB, tokenizer=large, targets=("q_proj", "o_proj", "up_proj"), seed=2
    )
    return Road(base, plus, add_pad(alpaca), small, large)
