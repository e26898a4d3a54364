"""A tokenizer inside a GGUF file, held to SentencePiece, tokenizers and transformers, before and after."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings

import gguf
import numpy as np
import pytest
from checkpoint_makers import CONFIG, add_pad, make_tokenizer, model
from gguf_makers import official
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pyalpaca.checkpoint import count_tokens, write_hf
from pyalpaca.checkpoint.container.gguf_file import gguf_layout, open_gguf_file
from pyalpaca.checkpoint.container.sentencepiece_file import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_sentencepiece,
)
from pyalpaca.checkpoint.gguf_model import open_gguf, write_gguf
from pyalpaca.checkpoint.gguf_token_files import read_tokenizer, tokenizer_folder, write_tokenizer
from pyalpaca.checkpoint.gguf_tokens import OWN_FIELDS, OWN_PIECES, PRE_TOKENIZERS, tokenizer_metadata
from pyalpaca.data import load_tokenizer

OTHER_KEYS = (
    "tokenizer.ggml.merges",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.chat_template",
    "llama.expert_count",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.scale_linear",
    "split.count",
    "general.alignment",
)
WORDS = "low lower lowest new newer newest wide wider widest happy unhappy happiness"
TEXT = "The lowest  of 12345 happy llamas isn't\n\tnewer — 羊驼, we'll see! <s> ½"


def write(folder, source, vocab_size, **config):
    """A GGUF file of a small model with this tokenizer."""
    write_gguf(model(dataclasses.replace(CONFIG, vocab_size=vocab_size, num_layers=1), tokenizer=source), folder / "m.gguf")
    return folder / "m.gguf"


def extracted(path, folder):
    folder.mkdir()
    write_tokenizer(path, folder)
    return folder


def transformers_tokenizer(folder):
    from transformers import AutoTokenizer

    (folder / "config.json").write_text('{"model_type": "llama"}')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoTokenizer.from_pretrained(folder)


def train(folder, **how):
    """A SentencePiece model of LLaMA's kind: bytes for unknown characters, no normalization."""
    (folder / "text.txt").write_text("\n".join([WORDS, TEXT] * 30))
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<sep>"],
        minloglevel=2,
        num_threads=1,
        **how,
    )
    return folder


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory):
    return train(tmp_path_factory.mktemp("llama_like"))


def test_a_sentencepiece_model_comes_back_to_the_byte(tmp_path, llama_like):
    plain = make_tokenizer(tmp_path / "plain", 97)
    for source, size in ((plain, 97), (plain, 105), (llama_like, 340)):
        path = write(tmp_path, source, size)
        assert read_tokenizer(path)["tokenizer.model"] == (source / "tokenizer.model").read_bytes()


def test_a_sentencepiece_model_is_what_sentencepiece_says_of_it(tmp_path, llama_like):
    fields = gguf.GGUFReader(write(tmp_path, llama_like, 343)).fields
    expected = SentencePieceProcessor(model_file=str(llama_like / "tokenizer.model"))
    texts = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert texts == [*expected.id_to_piece(list(range(340))), "[PAD340]", "[PAD341]", "[PAD342]"]
    assert fields["tokenizer.ggml.scores"].contents()[:340] == [expected.get_score(i) for i in range(340)]
    assert kinds[:4] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED]
    assert [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.BYTE] == [i for i in range(340) if expected.is_byte(i)]
    assert kinds[340:] == [gguf.TokenType.UNUSED] * 3
    ids = [fields[f"tokenizer.ggml.{key}_token_id"].contents() for key in ("bos", "eos", "unknown")]
    assert ids == [expected.bos_id(), expected.eos_id(), expected.unk_id()]
    assert fields["tokenizer.ggml.model"].contents() == "llama"


def test_a_sentencepiece_model_of_another_converter_splits_text_as_the_original_does(tmp_path, llama_like):
    """llama.cpp's converter knows nothing of our keys, and calls <unk> a control token of score -1000."""
    metadata = dict(open_gguf_file(write(tmp_path, llama_like, 350)).metadata)
    del metadata[OWN_PIECES], metadata[OWN_FIELDS]
    metadata["tokenizer.ggml.scores"] = np.where(np.arange(350) < 3, np.float32(-1000), metadata["tokenizer.ggml.scores"])
    metadata["tokenizer.ggml.token_type"] = np.where(np.arange(350) < 3, CONTROL, metadata["tokenizer.ggml.token_type"])
    folder = extracted(official(tmp_path / "theirs.gguf", metadata), tmp_path / "back")
    expected = SentencePieceProcessor(model_file=str(llama_like / "tokenizer.model"))
    found = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert found.get_piece_size() == 340
    for text in (TEXT, WORDS, "a <sep>b", " ", "  羊", ""):
        assert found.encode(text) == expected.encode(text)
        assert found.decode(found.encode(text)) == expected.decode(expected.encode(text))
    assert (found.unk_id(), found.bos_id(), found.eos_id(), found.pad_id()) == (0, 1, 2, -1)
    assert [found.is_unknown(0), found.is_control(1), found.is_unknown(1)] == [True, True, False]
    assert load_tokenizer(folder).encode(TEXT, bos=True) == [1, *expected.encode(TEXT)]


def test_a_sentencepiece_model_without_a_space_before_the_text_stays_so(tmp_path):
    source = train(tmp_path, add_dummy_prefix=False)
    path = write(tmp_path, source, 340)
    metadata = dict(open_gguf_file(path).metadata)
    assert metadata["tokenizer.ggml.add_space_prefix"] is False
    del metadata[OWN_PIECES], metadata[OWN_FIELDS]
    folder = extracted(official(tmp_path / "theirs.gguf", metadata), tmp_path / "back")
    expected = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    assert SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(TEXT) == expected.encode(TEXT)
    assert expected.id_to_piece(expected.encode("low"))[0][0] != "▁"


def test_a_sentencepiece_model_keeps_tokens_added_beside_it(tmp_path, llama_like):
    source = shutil.copytree(llama_like, tmp_path / "source")
    decoder = {
        "340": {"content": "<|user|>", "special": False},
        "341": {"content": "[PAD]", "special": True},
        "343": {"content": "▁new▁word", "special": False},
        "360": {"content": "<far>", "special": True},
    }
    config = {"add_bos_token": True, "add_eos_token": True, "pad_token": "[PAD]", "added_tokens_decoder": decoder}
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ bos_token }}"}))
    path = write(tmp_path, source, 350)
    metadata = open_gguf_file(path).metadata
    kinds = metadata["tokenizer.ggml.token_type"]
    assert metadata["tokenizer.ggml.tokens"][340:344] == ["<|user|>", "[PAD]", "[PAD342]", " new word"]
    assert kinds[340:345].tolist() == [CONTROL, CONTROL, UNUSED, USER_DEFINED, UNUSED]
    assert metadata["tokenizer.ggml.padding_token_id"] == 341
    assert metadata["tokenizer.ggml.add_eos_token"] is True
    assert metadata["tokenizer.chat_template"] == "{{ bos_token }}"
    folder = extracted(path, tmp_path / "back")
    assert (folder / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    back = load_tokenizer(folder)
    assert (back.vocab_size, back.pad_id, back.special[340]) == (344, 341, "<|user|>")
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == "{{ bos_token }}"
    theirs = transformers_tokenizer(folder)
    assert (theirs.pad_token_id, theirs.chat_template) == (341, "{{ bos_token }}")


def test_a_sentencepiece_model_with_a_pad_that_only_a_config_names_has_one_token_more(tmp_path):
    source = make_tokenizer(tmp_path / "source", 97)
    (source / "special_tokens_map.json").write_text("{}")
    add_pad(source)
    path = write(tmp_path, source, 98)
    assert open_gguf_file(path).metadata["tokenizer.ggml.padding_token_id"] == 97
    folder = extracted(path, tmp_path / "back")
    assert count_tokens(folder) == count_tokens(source) == 98
    path = write(tmp_path, source, 97)  # the model has no row for it
    assert "tokenizer.ggml.padding_token_id" not in open_gguf_file(path).metadata


def test_a_tokenizer_of_one_file_is_taken_over_by_another(tmp_path, llama_like):
    path = write(tmp_path, llama_like, 345)
    (tmp_path / "other").mkdir()
    write_gguf(open_gguf(path), tmp_path / "other" / "m.gguf", dtype="q8_0")
    first, second = (open_gguf_file(p).metadata for p in (path, tmp_path / "other" / "m.gguf"))
    keys = [key for key in first if key.startswith(("tokenizer.", "pyalpaca."))]
    assert [key for key in second if key.startswith(("tokenizer.", "pyalpaca."))] == keys
    assert all(np.array_equal(first[key], second[key]) for key in keys)
    with pytest.raises(ValueError, match=r"m\.gguf: its tokenizer has 345 tokens, but the model 346"):
        tokenizer_metadata(path, 346, {})


def test_a_tokenizer_is_lent_as_a_folder_wherever_it_is(tmp_path, llama_like):
    with tokenizer_folder(llama_like) as folder:
        assert folder == llama_like
    with tokenizer_folder(write(tmp_path, llama_like, 340)) as folder:
        tokenizer = load_tokenizer(folder)
    assert not folder.exists()
    assert tokenizer.encode(TEXT) == load_tokenizer(llama_like).encode(TEXT)


def test_ids_come_from_the_config_where_no_file_names_them(tmp_path, llama_like):
    metadata = tokenizer_metadata(llama_like, 340, {"bos_token_id": 7, "eos_token_id": [8, 9], "pad_token_id": -1})
    assert metadata["tokenizer.ggml.bos_token_id"] == 7
    assert metadata["tokenizer.ggml.eos_token_id"] == 2
    assert "tokenizer.ggml.padding_token_id" not in metadata


@pytest.fixture(scope="module")
def spelled(tmp_path_factory, llama_like):
    """The same tokenizer as only tokenizer.json has it, which is what transformers 5 saves."""
    tokenizer = transformers_tokenizer(shutil.copytree(llama_like, tmp_path_factory.mktemp("spelled") / "from"))
    folder = tmp_path_factory.mktemp("spelled_json")
    tokenizer.save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()
    return folder


def byte_level(folder, pre: str, **how):
    """A byte-level BPE tokenizer of LLaMA 3's kind, trained on a little text."""
    base = json.loads(Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe")).to_str())
    tokenizer = Tokenizer.from_str(json.dumps({**base, "pre_tokenizer": PRE_TOKENIZERS[pre], **how}))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([WORDS, TEXT] * 30, trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    tokenizer.add_tokens(["<tool>"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_tokenizer_json_of_sentencepieces_kind_becomes_a_sentencepiece_model(tmp_path, spelled, llama_like):
    path = write(tmp_path, spelled, 345)
    folder = extracted(path, tmp_path / "back")
    pieces, _ = read_sentencepiece(folder / "tokenizer.model")
    original, _ = read_sentencepiece(llama_like / "tokenizer.model")
    assert [p.text for p in pieces] == [p.text for p in original]
    assert [p.kind for p in pieces[:5]] == [UNKNOWN, CONTROL, CONTROL, USER_DEFINED, BYTE]
    assert {p.kind for p in pieces[260:]} == {NORMAL}
    tokenizer = Tokenizer.from_file(str(spelled / "tokenizer.json"))
    back = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in (TEXT.replace("<s>", ""), WORDS, "unhappiest"):
        assert back.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_a_tokenizer_json_of_byte_level_bpe_comes_back(pre, tmp_path):
    source = byte_level(tmp_path / "source", pre)
    path = write(tmp_path, source, 350)
    metadata = open_gguf_file(path).metadata
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == pre
    assert [metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos")] == [300, 301]
    assert metadata["tokenizer.ggml.token_type"][298:305].tolist() == [NORMAL] * 2 + [CONTROL] * 2 + [
        USER_DEFINED,
        UNUSED,
        UNUSED,
    ]
    folder = extracted(path, tmp_path / "back")
    before, after = (json.loads((f / "tokenizer.json").read_text()) for f in (source, folder))
    assert after["model"] == before["model"]
    assert after["added_tokens"] == [{**token, "normalized": False} for token in before["added_tokens"]]
    assert after["pre_tokenizer"] == before["pre_tokenizer"]
    first, second = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (source, folder))
    for text in (TEXT, WORDS, "<|end_of_text|><tool>x"):
        ids = first.encode(text).ids
        assert second.encode(text, add_special_tokens=False).ids == ids
        assert second.decode(ids) == first.decode(ids)
    assert second.encode("low").ids == [*[300] * (pre == "llama-bpe"), *first.encode("low").ids]
    theirs = transformers_tokenizer(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (300, 301)
    assert theirs(TEXT, add_special_tokens=False).input_ids == first.encode(TEXT).ids


def test_a_tokenizer_json_may_spell_merges_as_texts_and_put_tokens_around(tmp_path):
    source = byte_level(tmp_path / "source", "gpt-2")
    content = json.loads((source / "tokenizer.json").read_text())
    pairs = content["model"]["merges"]
    content["model"]["merges"] = [" ".join(pair) for pair in pairs]
    around = [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": around, "pair": around, "special_tokens": {}}
    content["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    (source / "tokenizer.json").write_text(json.dumps(content))
    path = write(tmp_path, source, 303)
    metadata = open_gguf_file(path).metadata
    assert metadata["tokenizer.ggml.merges"] == [" ".join(pair) for pair in pairs]
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    back = Tokenizer.from_file(str(extracted(path, tmp_path / "back") / "tokenizer.json"))
    assert back.encode("low").tokens[0] == "<|begin_of_text|>"
    assert back.encode("low", "new").tokens.count("<|begin_of_text|>") == 2


def test_a_tokenizer_json_gives_the_special_ids_to_the_config_of_the_folder(tmp_path):
    path = write(tmp_path, byte_level(tmp_path / "source", "llama-bpe"), 303)
    write_hf(open_gguf(path), tmp_path / "hf")
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (300, 301)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 301


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pre_tokenizer": {"type": "Whitespace"}},
            "cuts text in a way that llama.cpp has no name for, expected that of llama-bpe",
        ),
        ({"normalizer": {"type": "NFC"}}, "cuts text in a way that llama.cpp has no name for"),
        ({"model": {"vocab": {"a": "b"}}}, "its tokenizer files are not as Hugging Face writes them"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "is a Unigram model, expected BPE as LLaMA's"),
        ({"added_tokens": [{"id": 5}]}, "its tokenizer files are not as Hugging Face writes them"),
        ({"added_tokens": [{"id": 5, "content": "a"}]}, "the tokens 5 and [0-9]+ are both 'a', which llama.cpp can't load"),
    ],
)
def test_a_tokenizer_that_llama_cpp_could_not_use_is_refused(change, message, tmp_path):
    source = byte_level(tmp_path / "source", "gpt-2")
    content = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_metadata(source, 350, {})
    assert str(error.value).startswith(str(source))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "its tokenizer is of the kind 'bert', expected 'llama' or 'gpt2'"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"}, "its tokenizer cuts text as 'qwen2', which can't be"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama3"}, "its tokenizer has no merges"),
        ({"tokenizer.ggml.tokens": None}, "has no list of tokens"),
        ({"tokenizer.ggml.scores": None}, "has tokens without scores"),
        ({"tokenizer.ggml.scores": np.ones(3, np.float32)}, "tokenizer.ggml.scores does not fit the 340 tokens"),
        ({"tokenizer.ggml.tokens": ["a"] * 340, OWN_PIECES: None}, "its tokens make no SentencePiece model"),
        ({"tokenizer.ggml.tokens": [""] * 340, OWN_PIECES: None}, "its tokens make no SentencePiece model"),
        ({OWN_FIELDS: np.arange(9, dtype=np.uint8)}, "its tokens make no SentencePiece model"),
    ],
)
def test_metadata_that_makes_no_files_is_refused(change, message, tmp_path, llama_like):
    metadata = {**open_gguf_file(write(tmp_path, llama_like, 340)).metadata, **change}
    path = official(tmp_path / "theirs.gguf", {key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(ValueError, match=message) as error:
        read_tokenizer(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_damaged_sentencepiece_model_is_refused(tmp_path, llama_like):
    raw = (llama_like / "tokenizer.model").read_bytes()
    for content in (raw[:1000], b"\x0a\x03\x0a\x01\xff", b"\x12\x00", b"{}", b"\x0a\xff\xff\xff\xff\x7f"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.model: "):
            read_sentencepiece(tmp_path / "tokenizer.model")


def test_a_model_may_be_without_a_tokenizer(tmp_path):
    path = write(tmp_path, None, 97)
    assert open_gguf_file(path).metadata["tokenizer.ggml.model"] == "none"
    assert open_gguf(path).tokenizer is None
    assert read_tokenizer(path) == {}


ANYTHING = st.one_of(
    st.booleans(),
    st.text(max_size=5),
    st.sampled_from(["llama", "gpt2", "none", "linear", "llama-bpe", "default", "yarn"]),
    st.lists(st.text(st.characters(codec="utf-8"), max_size=3), max_size=5),
    st.integers(0, 2**32 - 1).map(np.uint32),
    st.integers(0, 5).map(np.uint32),
    st.integers(-3, 3).map(np.int64),
    st.floats(width=32).map(np.float32),
    st.lists(st.integers(-1, 7), max_size=5).map(lambda listed: np.array(listed, np.int32)),
    st.lists(st.floats(width=32), max_size=5).map(lambda listed: np.array(listed, np.float32)),
    st.lists(st.booleans(), max_size=5).map(lambda listed: np.array(listed, np.bool_)),
)


@pytest.fixture(scope="module")
def usual(tmp_path_factory, llama_like):
    """The metadata of a written file, and names and shapes of its tensors."""
    file = open_gguf_file(write(tmp_path_factory.mktemp("usual"), llama_like, 340))
    return dict(file.metadata), {name: (shape, "F32") for name, shape in file.tensors.shapes.items()}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_metadata_of_any_kind_gives_a_model_and_its_files_or_a_sentence(data, tmp_path, usual):
    metadata, table = usual
    keys = st.sampled_from([*metadata, *OTHER_KEYS])
    changes = data.draw(st.dictionaries(keys, st.one_of(st.none(), ANYTHING), min_size=1, max_size=4))
    path = tmp_path / "fuzz.gguf"
    changed = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    layout = gguf_layout("fuzz.gguf", changed, table)
    with path.open("wb") as file:
        file.truncate(layout.size)
        file.write(layout.seal({})[0][1])
    for read in (open_gguf, read_tokenizer):
        try:
            read(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: "), error
