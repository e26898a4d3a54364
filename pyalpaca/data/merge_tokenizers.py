"""A LLaMA tokenizer and a Chinese one to one SentencePiece model: LLaMA's pieces, then each Chinese piece that it lacks.

A SentencePiece file is a protobuf message whose field 1 repeats: one message for each piece, with its text in field 1, its
score in field 2 and its type in field 3. All that is not changed stays byte for byte.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

from pyalpaca.data.downloads import refuse_downloads
from pyalpaca.files import atomic_file
from pyalpaca.protobuf import FIXED32, bytes_field, fields

PAD = "[PAD]"


def merge_tokenizers(base_model: Path, chinese_model: Path, out_model: Path, add_pad: bool = False) -> int:
    """Write the merged SentencePiece model and return its number of pieces.

    New pieces come in the order of the Chinese model, with score 0 and without a type, as Chinese-LLaMA's have: ids of the
    base stay, and the bytes of the file equal the published ones. `add_pad` appends [PAD], as in Chinese-Alpaca.
    FileNotFoundError or ValueError for a file that is no SentencePiece model.
    """
    pieces, end, raw = read_model(base_model)
    known = set(pieces)
    wanted = [piece for piece in read_model(chinese_model)[0] if piece not in known]
    if add_pad and PAD not in known:
        wanted.append(PAD)
    with atomic_file(out_model) as partial:
        partial.write_bytes(raw[:end] + b"".join(map(_piece, wanted)) + raw[end:])
    return len(pieces) + len(wanted)


def read_model(file: Path) -> tuple[list[str], int, bytes]:
    """The pieces of a SentencePiece file, where in it the last one ends, and all its bytes.

    FileNotFoundError or ValueError if it is none.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, expected a SentencePiece model; check the path")
    raw = file.read_bytes()
    refuse_downloads(file, raw[:64], "a SentencePiece model")
    pieces: list[str] = []
    end = 0
    try:
        for number, value, stop in fields(raw):
            if number == 1:
                pieces.append(next(text for field, text, _ in fields(value) if field == 1).decode())
                end = stop
    except (ValueError, StopIteration, IndexError) as error:
        raise ValueError(
            f"{file}: is not a SentencePiece model, its {len(raw):,} bytes do not parse; "
            "expected a file such as tokenizer.model, download it again"
        ) from error
    if not pieces:
        raise ValueError(f"{file}: holds no pieces, expected a SentencePiece model; download it again")
    return pieces, end, raw


def _piece(text: str) -> bytes:
    """A piece as field 1 of a model. Its score is written though it is 0: the published file has it so."""
    score = bytes([2 << 3 | FIXED32]) + struct.pack("<f", 0.0)
    return bytes_field(1, bytes_field(1, text.encode()) + score)


def write_tokenizer_folder(model: Path, folder: Path) -> None:
    """Fill `folder` with a SentencePiece model and the two JSON files by which Hugging Face knows it as a LLaMA tokenizer."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    pieces, _, raw = read_model(model)
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
    with atomic_file(folder / "tokenizer.model") as partial:
        partial.write_bytes(raw)
    for name, content in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
        with atomic_file(folder / name) as partial:
            partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
