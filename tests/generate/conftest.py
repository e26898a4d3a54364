"""One tiny model with a tokenizer for all tests of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
from generate_makers import make_model

from pyalpaca.generate.engine import Model, load_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's Hugging Face folder."""
    return make_model(tmp_path_factory.mktemp("generate") / "hf")


@pytest.fixture(scope="session")
def model(folder: Path) -> Model:
    return load_model(folder)
