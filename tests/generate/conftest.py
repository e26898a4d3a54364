"""One tiny model with a tokenizer for all tests of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from generate_makers import make_model

from pyalpaca.generate.engine import Model, load_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's Hugging Face folder."""
    return make_model(tmp_path_factory.mktemp("generate") / "hf")


@pytest.fixture(scope="session")
def model(folder: Path) -> Model:
    return load_model(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Nothing here is large enough for a second thread to be worth waking."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
