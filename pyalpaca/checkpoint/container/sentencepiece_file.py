"""SentencePiece's model file: its pieces, and all the rest, which says how text is split.

It is a protobuf message whose field 1 repeats, one message a piece: text, score, type. Source: sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pyalpaca.checkpoint.container.tensor_file import check_head
from pyalpaca.protobuf import FIXED32, bytes_field, fields, number_field, read_varint

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces; GGUF has the same numbers."""

_BPE = 2


class Token(NamedTuple):
    """A piece of text, how much it is preferred, and its type."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


def read_sentencepiece(path: Path) -> tuple[list[Token], bytes]:
    """The pieces of a file and its other fields, encoded as they are. FileNotFoundError or ValueError if it is no model."""
    check_head(path, "a SentencePiece model")
    raw = path.read_bytes()
    pieces, rest = [], b""
    try:
        start = 0
        for number, content, end in fields(raw):
            if number == 1:
                pieces.append(_piece(content))
            else:
                rest += raw[start:end]
            start = end
        has_leading_space(rest)
    except (ValueError, IndexError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"{path}: is not a SentencePiece model ({error}); download it again") from None
    if not pieces:
        raise ValueError(f"{path}: holds no pieces, expected a SentencePiece model; download it again")
    return pieces, rest


def sentencepiece_bytes(pieces: Iterable[Token], rest: bytes) -> bytes:
    """The file of these pieces and other fields, encoded as SentencePiece does: a normal piece goes without its type."""
    messages = (
        bytes_field(1, p.text.encode())
        + bytes([2 << 3 | FIXED32])
        + struct.pack("<f", p.score)
        + (b"" if p.kind == NORMAL else number_field(3, p.kind))
        for p in pieces
    )
    return b"".join(bytes_field(1, message) for message in messages) + rest


def llama_fields(pieces: list[Token], bos: int, eos: int, pad: int | None, leading_space: bool) -> bytes:
    """The other fields of a model that splits text as LLaMA's does: BPE, no normalization, unknown characters as bytes."""
    unknown = next((i for i, p in enumerate(pieces) if p.kind == UNKNOWN), 0)
    ids = {40: unknown, 41: bos, 42: eos}
    trainer = number_field(3, _BPE) + number_field(4, len(pieces)) + number_field(35, int(any(p.kind == BYTE for p in pieces)))
    trainer += b"".join(number_field(field, i) for field, i in ids.items()) + (b"" if pad is None else number_field(43, pad))
    trainer += b"".join(bytes_field(field + 5, pieces[i].text.encode()) for field, i in ids.items())
    trainer += b"" if pad is None else bytes_field(48, pieces[pad].text.encode())
    normalizer = bytes_field(1, b"identity") + bytes_field(2, b"") + number_field(3, int(leading_space)) + number_field(4, 0)
    return bytes_field(2, trainer) + bytes_field(3, normalizer)


def has_leading_space(rest: bytes) -> bool:
    """Whether a model with these other fields puts a space before the text."""
    for number, content, _ in fields(rest):
        if number == 3:
            return not any(field == 3 and value == b"\0" for field, value, _ in fields(content))
    return True


def _piece(message: bytes) -> Token:
    found = {number: content for number, content, _ in fields(message)}
    score = struct.unpack("<f", found[2])[0] if 2 in found else 0.0
    return Token(found[1].decode(), score, read_varint(found[3], 0)[0] if 3 in found else NORMAL)
