from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

from pyalpaca.commands.merge_tokenizers import main
from pyalpaca.data import load_tokenizer, merge_tokenizers

SENTENCE = "人工智能是计算机科学、心理学、哲学等学科融合的交叉学科。"
IDS = [29871, 43819, 30392, 33482, 32599, 30330, 36752, 30330, 34802, 31184, 34028, 35258, 30210, 38879, 34028, 30267]


@pytest.mark.parametrize(
    ("flags", "pieces", "size", "sha256"),
    [
        ((), 49_953, 757_958, "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0"),
        (("--add_pad",), 49_954, 757_972, "2d967e855b1213a439df6c8ce2791f869c84b4f3b6cfacf22b86440b8192a2f8"),
    ],
)
def test_the_merged_models_are_the_published_bytes(
    flags: tuple[str, ...], pieces: int, size: int, sha256: str, shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama, chinese = shipped / "llama-tokenizer.model", shipped / "chinese_sp.model"
    command = ["--llama_tokenizer_dir", str(llama), "--chinese_sp_model_file", str(chinese), "--output_dir", str(tmp_path)]
    assert main([*command, *flags]) == 0
    for file in (tmp_path / "merged_tokenizer_sp" / "chinese_llama.model", tmp_path / "merged_tokenizer_hf" / "tokenizer.model"):
        raw = file.read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (size, sha256)
    assert f"{pieces:,} pieces" in (out := capsys.readouterr().out)
    assert "35 ids before, 16 after" in out
    tokenizer = load_tokenizer(tmp_path / "merged_tokenizer_hf")
    assert tokenizer.vocab_size == pieces
    assert tokenizer.encode(SENTENCE) == IDS


def test_transformers_opens_the_folder(alpaca_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(alpaca_folder)
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.pad_token) == (49_954, 49_953, "[PAD]")
    assert tokenizer.encode(SENTENCE) == [1, *IDS]


def test_the_merged_model_is_what_protobuf_reads(shipped: Path, alpaca_folder: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    merged, base = sentencepiece_model_pb2.ModelProto(), sentencepiece_model_pb2.ModelProto()
    merged.ParseFromString((alpaca_folder / "tokenizer.model").read_bytes())
    base.ParseFromString((shipped / "llama-tokenizer.model").read_bytes())
    new = merged.pieces[32_000:]
    assert {(piece.score, piece.HasField("score"), piece.HasField("type")) for piece in new} == {(0.0, True, False)}
    assert new[-1].piece == "[PAD]"
    del merged.pieces[32_000:]
    assert merged == base


@pytest.mark.parametrize("add_pad", [False, True])
def test_small_models_merge_too(add_pad: bool, tmp_path: Path) -> None:
    texts = [
        "the cat sat on the mat and the dog ate the cake",
        "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少",
        "人人为我我为人人",
    ] * 9
    for name, size in (("base", 300), ("chinese", 320)):
        text = texts if name == "chinese" else texts[::3]
        SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_prefix=str(tmp_path / name),
            vocab_size=size,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    out = tmp_path / "merged" / "tokenizer.model"
    count = merge_tokenizers(tmp_path / "base.model", tmp_path / "chinese.model", out, add_pad)
    base, merged = load_tokenizer(tmp_path / "base.model"), load_tokenizer(out)
    assert merged.vocab_size == count > base.vocab_size
    assert merged.pad_id == (count - 1 if add_pad else None)
    for text in texts:
        assert merged.decode(merged.encode(text)) == text
        assert len(merged.encode(text)) <= len(base.encode(text))


def test_a_file_that_is_no_model_is_refused(shipped: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.model"
    page.write_text("<html>not a model</html>")
    command = ["--llama_tokenizer_dir", str(shipped / "llama-tokenizer.model"), "--output_dir", str(tmp_path / "out")]
    cut = tmp_path / "cut.model"
    cut.write_bytes((shipped / "chinese_sp.model").read_bytes()[:100_000])
    for file, message in (
        (page, "is an HTML page, expected a SentencePiece model"),
        (cut, "its 100,000 bytes do not parse"),
        (tmp_path / "absent.model", "no such file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            main([*command, "--chinese_sp_model_file", str(file)])
    assert not (tmp_path / "out").exists()
