"""SentencePiece's model file: its pieces, and all the rest, which says how text is split.

It is a protobuf message whose field 1 repeats, one message a piece: text, score, type. That much of the encoding is read and
written here, so that no protobuf package has to fit the one SentencePiece was built with. Source: sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pyalpaca.checkpoint.container.tensor_file import check_head

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces; GGUF has the same numbers."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
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
        for number, content, end in _fields(raw):
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
        _bytes(1, p.text.encode())
        + bytes([2 << 3 | _FIXED32])
        + struct.pack("<f", p.score)
        + (b"" if p.kind == NORMAL else _number(3, p.kind))
        for p in pieces
    )
    return b"".join(_bytes(1, message) for message in messages) + rest


def llama_fields(pieces: list[Token], bos: int, eos: int, pad: int | None, leading_space: bool) -> bytes:
    """The other fields of a model that splits text as LLaMA's does: BPE, no normalization, unknown characters as bytes."""
    unknown = next((i for i, p in enumerate(pieces) if p.kind == UNKNOWN), 0)
    ids = {40: unknown, 41: bos, 42: eos}
    trainer = _number(3, _BPE) + _number(4, len(pieces)) + _number(35, int(any(p.kind == BYTE for p in pieces)))
    trainer += b"".join(_number(field, i) for field, i in ids.items()) + (b"" if pad is None else _number(43, pad))
    trainer += b"".join(_bytes(field + 5, pieces[i].text.encode()) for field, i in ids.items())
    trainer += b"" if pad is None else _bytes(48, pieces[pad].text.encode())
    normalizer = _bytes(1, b"identity") + _bytes(2, b"") + _number(3, int(leading_space)) + _number(4, 0)
    return _bytes(2, trainer) + _bytes(3, normalizer)


def has_leading_space(rest: bytes) -> bool:
    """Whether a model with these other fields puts a space before the text."""
    for number, content, _ in _fields(rest):
        if number == 3:
            return not any(field == 3 and value == b"\0" for field, value, _ in _fields(content))
    return True


def _piece(message: bytes) -> Token:
    found = {number: content for number, content, _ in _fields(message)}
    score = struct.unpack("<f", found[2])[0] if 2 in found else 0.0
    return Token(found[1].decode(), score, _read_varint(found[3], 0)[0] if 3 in found else NORMAL)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, int]]:
    """The fields of a protobuf message: number, content (its encoding, where it is a number), where it ends."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        kind, start = key & 7, at
        if kind == _VARINT:
            at = _read_varint(message, at)[1]
        elif kind == _BYTES:
            length, start = _read_varint(message, at)
            at = start + length
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"no field begins with {key}")
        if at > len(message):
            raise ValueError("it is cut off")
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


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(content)) + content
