"""A LLaMA tokenizer and a Chinese one to one SentencePiece model: LLaMA's pieces, then each Chinese piece that it lacks.

A SentencePiece file is a protobuf message whose field 1 repeats: one message for each piece, with its text in field 1, its
score in field 2 and its type in field 3. That much of the encoding is read and written here, so that no protobuf package has
to fit the one that SentencePiece was built with, and all that is not changed stays byte for byte.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from pyalpaca.data.downloads import refuse_downloads
from pyalpaca.files import atomic_file

PAD = "[PAD]"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


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
        for number, value, stop in _fields(raw):
            if number == 1:
                pieces.append(next(text for field, text, _ in _fields(value) if field == 1).decode())
                end = stop
    except (ValueError, StopIteration, IndexError) as error:
        raise ValueError(
            f"{file}: is not a SentencePiece model, its {len(raw):,} bytes do not parse; "
            "expected a file such as tokenizer.model, download it again"
        ) from error
    if not pieces:
        raise ValueError(f"{file}: holds no pieces, expected a SentencePiece model; download it again")
    return pieces, end, raw


def _fields(message: bytes) -> Iterator[tuple[int, bytes, int]]:
    """The fields of a protobuf message: number, content (of a length-delimited field), where it ends."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            start, at = at, _read_varint(message, at)[1]
        elif kind == _BYTES:
            length, start = _read_varint(message, at)
            at = start + length
        elif kind in (_FIXED64, _FIXED32):
            start, at = at, at + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"no field begins with {key}")
        if at > len(message):
            raise ValueError("the message is cut off")
        yield key >> 3, message[start:at], at


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _piece(text: str) -> bytes:
    """A piece as field 1 of a model. Its score is written though it is 0: the published file has it so."""
    raw = text.encode()
    message = bytes([1 << 3 | _BYTES]) + _varint(len(raw)) + raw + bytes([2 << 3 | _FIXED32]) + struct.pack("<f", 0.0)
    return bytes([1 << 3 | _BYTES]) + _varint(len(message)) + message


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
