"""As much of protobuf's encoding as SentencePiece's model files need, so that no protobuf package has to fit theirs.

A message is a row of fields: a number with the kind of its content, then the content. Source: protobuf.dev, Encoding.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""The kinds of content."""


def fields(message: bytes) -> Iterator[tuple[int, bytes, int]]:
    """The fields of a message: number, content (its encoding, where it is a number), where it ends.

    ValueError or IndexError if it is none.
    """
    at = 0
    while at < len(message):
        key, at = read_varint(message, at)
        kind, start = key & 7, at
        if kind == VARINT:
            at = read_varint(message, at)[1]
        elif kind == BYTES:
            length, start = read_varint(message, at)
            at = start + length
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"no field begins with {key}")
        if at > len(message):
            raise ValueError("it is cut off")
        yield key >> 3, message[start:at], at


def read_varint(message: bytes, at: int) -> tuple[int, int]:
    """(the number whose encoding begins at `at`, where it ends)."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def varint(value: int) -> bytes:
    """A number's encoding, seven bits a byte, the lowest first."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def number_field(field: int, value: int) -> bytes:
    """A field that is a number."""
    return varint(field << 3 | VARINT) + varint(value)


def bytes_field(field: int, content: bytes) -> bytes:
    """A field that is a text or a message."""
    return varint(field << 3 | BYTES) + varint(len(content)) + content
