from __future__ import annotations

import builtins
import json
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from pyalpaca.data import Tokenizer, load_tokenizer, read_records, stream_decoder

TEXTS = [
    "Hello world",
    "人工智能是计算机科学、心理学、哲学等学科融合的交叉学科。",
    "\n### Instruction:\n把句子改成疑问句。\n你喜欢读书。\n### Response:\n",
    "def f(x):\n\treturn x ** 2\n",
    "naïve café, Ελλάδα, Россия, 日本語, 한국어, עברית",
    "emoji 🦙🏔️ and a rare character 𠮷 𝄞",
    "trailing space ",
    "",
]


def shipped_texts(shipped: Path) -> list[str]:
    return [record["instruction"] + record["output"] for record in read_records(shipped / "records.json")[0]]


@pytest.mark.parametrize("folder", ["llama_folder", "alpaca_folder"])
def test_ids_equal_those_of_transformers(folder: str, request: pytest.FixtureRequest) -> None:
    from transformers import LlamaTokenizer

    path = request.getfixturevalue(folder)
    theirs, ours = LlamaTokenizer.from_pretrained(path), load_tokenizer(path)
    assert (len(theirs), theirs.bos_token_id, theirs.eos_token_id) == (ours.vocab_size, ours.bos_id, ours.eos_id)
    assert theirs.pad_token_id == ours.pad_id
    for text in TEXTS:
        assert ours.encode(text, bos=True) == theirs.encode(text)
        ids = ours.encode(text, bos=True, eos=True)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["llama", "alpaca"])
def test_any_ids_decode_as_sentencepiece_does(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    oracle = SentencePieceProcessor(model_file=str(tokenizer.path))
    draw = random.Random(0)
    pad = oracle.get_piece_size() - (tokenizer.pad_id is not None)
    for _ in range(500):
        # Half of them byte pieces, so that broken and whole characters of all lengths occur.
        ids = [draw.randrange(3, draw.choice([259, pad])) for _ in range(draw.randrange(12))]
        assert tokenizer.decode(ids) == oracle.decode(ids)


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁")))
@settings(deadline=None, max_examples=60)
def test_any_text_comes_back(llama: Tokenizer, text: str) -> None:
    """Any but ▁, which SentencePiece takes for a space."""
    assert llama.decode(llama.encode(text)) == text


def test_a_streamed_text_is_the_decoded_text_and_never_half_a_character(alpaca: Tokenizer) -> None:
    ids = [i for text in TEXTS for i in alpaca.encode(text, bos=True, eos=True)]
    add, end = stream_decoder(alpaca)
    pieces = [add(i) for i in ids]
    assert "".join(pieces) + end() == alpaca.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    byte_ids = [3 + byte for byte in "𠮷".encode()]
    add, end = stream_decoder(alpaca)
    assert [add(i) for i in byte_ids] == ["", "", "", "𠮷"]
    assert end() == ""


def test_a_stream_that_ends_inside_a_character_says_so(llama: Tokenizer) -> None:
    add, end = stream_decoder(llama)
    assert add(3 + 0xE4) + add(3 + 0xBD) == ""
    assert end() == "\ufffd\ufffd" == llama.decode([3 + 0xE4, 3 + 0xBD])


def test_special_tokens_in_a_text_are_text(alpaca: Tokenizer) -> None:
    ids = alpaca.encode("</s> [PAD] <s>")
    assert not {alpaca.bos_id, alpaca.eos_id, alpaca.pad_id} & set(ids)
    assert alpaca.decode(ids) == "</s> [PAD] <s>"


def test_tokens_added_beside_the_model_count_and_are_skipped(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "with_pad")
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 32000}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (32001, 32000)
    ids = [*tokenizer.encode("hi"), 32000]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special=False) == "hi[PAD]"

    (folder / "added_tokens.json").unlink()
    decoder = {
        "2": {"content": "</s>", "special": True},
        "32000": {"content": "[PAD]", "special": True},
        "32001": {"content": "<tool>", "special": False},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (32002, 32000)
    assert tokenizer.decode([32001, 32000]) == "<tool>"


def test_a_tokenizer_json_gives_the_same_ids(llama: Tokenizer, llama_folder: Path, shipped: Path, tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    LlamaTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.path.name == "tokenizer.json"
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (32000, 1, 2, None)
    for text in [*TEXTS, *shipped_texts(shipped), "</s> <s>"]:
        assert tokenizer.encode(text, bos=True) == llama.encode(text, bos=True)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_merged_vocabulary_is_encoded_as_its_models_were_trained(alpaca: Tokenizer, shipped: Path) -> None:
    """By SentencePiece: among the new pieces, whose scores are all 0, the leftmost wins; transformers 5 takes the lowest id."""
    oracle = SentencePieceProcessor(model_file=str(alpaca.path))
    for text in [*TEXTS, *shipped_texts(shipped)]:
        assert alpaca.encode(text) == oracle.encode(text)
    assert [alpaca.decode([i]) for i in alpaca.encode("首都是")] == ["", "首都", "是"]


def test_without_the_package_a_tokenizer_json_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    real = builtins.__import__

    def fake(name: str, *args: object, **kwargs: object) -> object:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(ValueError, match=r"tokenizer\.json.*`tokenizers`.*not installed"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n<!DOCTYPE html><html>...", "is an HTML page, expected a SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\noid ...", "is a Git LFS pointer"),
        (b"\x00\x01 nothing", "SentencePiece cannot read"),
        (b"", "SentencePiece cannot read"),
    ],
)
def test_a_file_that_is_no_model_says_what_it_is(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(file) in str(error.value)


def test_a_truncated_model_is_refused(shipped: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes((shipped / "llama-tokenizer.model").read_bytes()[:100_001])
    with pytest.raises(ValueError, match="cannot read"):
        load_tokenizer(file)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tokenizer(tmp_path / "absent.model")


def test_an_id_outside_the_vocabulary_is_refused(llama: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no piece has id 32000, the vocabulary ends at 31999"):
        llama.decode([32000])
