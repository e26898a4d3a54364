"""Tokenizer files: counted as transformers counts them, copied with what it needs."""

from __future__ import annotations

import json
import shutil

import pytest
from checkpoint_makers import PLUS_VOCAB, add_pad

from pyalpaca.checkpoint import copy_tokenizer, count_tokens


def plain(folder, road):
    pass


def named_in_the_map(folder, road):
    add_pad(folder)


def named_in_the_config(folder, road):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "[PAD]"}))


def added(folder, road):
    named_in_the_config(folder, road)
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": PLUS_VOCAB}))


def saved_by_transformers(folder, road):
    from transformers import AutoTokenizer

    add_pad(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shutil.rmtree(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "more"),
    [(plain, 0), (named_in_the_map, 1), (named_in_the_config, 1), (added, 1), (saved_by_transformers, 1)],
)
def test_tokens_are_counted_as_transformers_counts_them(road, tmp_path, change, more):
    from transformers import AutoTokenizer

    folder = tmp_path / "t"
    folder.mkdir()
    copy_tokenizer(road.plus_tokenizer, folder)
    change(folder, road)
    assert count_tokens(folder) == PLUS_VOCAB + more
    assert len(AutoTokenizer.from_pretrained(folder)) == PLUS_VOCAB + more


def test_the_class_name_of_old_folders_is_corrected(road, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(road.plus_tokenizer, old)
    new.mkdir()
    (old / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LLaMATokenizer", "bos_token": ""}))
    copy_tokenizer(old, new)
    assert json.loads((new / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    assert (new / "tokenizer.model").read_bytes() == (old / "tokenizer.model").read_bytes()


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01garbage")
    with pytest.raises(ValueError, match=r"tokenizer\.model: is not a SentencePiece model"):
        count_tokens(tmp_path)
    (tmp_path / "tokenizer.model").write_text("<html></html>")
    with pytest.raises(ValueError, match=r"tokenizer\.model: is an HTML page"):
        count_tokens(tmp_path)
