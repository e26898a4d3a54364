"""The real vocabularies, opened and merged once for all tests of this room."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import pyalpaca
from pyalpaca.data import Tokenizer, load_tokenizer, merge_tokenizers, write_tokenizer_folder

SHIPPED = Path(pyalpaca.__file__).parent / "demo" / "data"


@pytest.fixture(scope="session")
def shipped() -> Path:
    """Folder of llama-tokenizer.model, chinese_sp.model and records.json."""
    return SHIPPED


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tokenizer_folder(SHIPPED / "llama-tokenizer.model", folder)
    return folder


@pytest.fixture(scope="session")
def alpaca_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of Chinese-Alpaca's tokenizer, 49,954 pieces."""
    folder = tmp_path_factory.mktemp("alpaca")
    merge_tokenizers(SHIPPED / "llama-tokenizer.model", SHIPPED / "chinese_sp.model", folder / "sp.model", add_pad=True)
    write_tokenizer_folder(folder / "sp.model", folder / "hf")
    shutil.move(folder / "sp.model", folder / "hf" / "chinese_llama.model")
    return folder / "hf"


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> Tokenizer:
    return load_tokenizer(llama_folder)


@pytest.fixture(scope="session")
def alpaca(alpaca_folder: Path) -> Tokenizer:
    return load_tokenizer(alpaca_folder)
