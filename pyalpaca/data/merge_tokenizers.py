"""A LLaMA tokenizer and a Chinese one to one SentencePiece model: LLaMA's pieces, then each Chinese piece that it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyalpaca.files import atomic_file

PAD = "[PAD]"


def merge_tokenizers(base_model: Path, chinese_model: Path, out_model: Path, add_pad: bool = False) -> int:
    """Write the merged SentencePiece model and return its number of pieces.

    New pieces come in the order of the Chinese model, with score 0 and without a type, as Chinese-LLaMA's have: ids of the
    base stay, and the bytes of the file equal the published ones. `add_pad` appends [PAD], as in Chinese-Alpaca.
    FileNotFoundError or ValueError for a file that is no SentencePiece model.
    """
    base, chinese = read_model(base_model), read_model(chinese_model)
    known = {piece.piece for piece in base.pieces}
    wanted = [piece.piece for piece in chinese.pieces if piece.piece not in known]
    if add_pad and PAD not in known:
        wanted.append(PAD)
    for text in wanted:
        # The field is written because it is set, though 0 is what a reader would assume: the published file has it.
        base.pieces.add(piece=text, score=0.0)
    with atomic_file(out_model) as partial:
        partial.write_bytes(base.SerializeToString())
    return len(base.pieces)


def read_model(file: Path) -> Any:
    """The ModelProto in a SentencePiece file. FileNotFoundError or ValueError if there is none."""
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ValueError(
            f"{file}: merging tokenizers needs the package `protobuf`, which is not installed; install it"
        ) from error
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, expected a SentencePiece model; check the path")
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined,unused-ignore]
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ValueError(
            f"{file}: is not a SentencePiece model ({file.stat().st_size:,} bytes that do not parse), expected a file such as "
            "tokenizer.model; download it again"
        ) from error
    if not model.pieces:
        raise ValueError(f"{file}: holds no pieces, expected a SentencePiece model; download it again")
    return model


def write_tokenizer_folder(model: Path, folder: Path) -> None:
    """Fill `folder` with a SentencePiece model and the two JSON files by which Hugging Face knows it as a LLaMA tokenizer."""
    pieces = [piece.piece for piece in read_model(model).pieces]
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if PAD in pieces:
        special["pad_token"] = PAD
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        **special,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 2048,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "tokenizer.model") as partial:
        partial.write_bytes(model.read_bytes())
    for name, content in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
        with atomic_file(folder / name) as partial:
            partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
