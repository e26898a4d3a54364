"""GGUF, llama.cpp's file: typed key-value pairs, a table of tensors, then their data, each at a multiple of the alignment.

The header is read here, because the `gguf` package believes every count that a file claims. Little-endian, versions 2 and 3 are
read, 3 is written. Sources: docs/gguf.md of ggml, gguf.cpp of llama.cpp.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pyalpaca.checkpoint.container.gguf_types import PLAIN, block_size, decode, stored_spec, type_code, type_name
from pyalpaca.checkpoint.container.layout import FileLayout
from pyalpaca.checkpoint.container.tensor_file import Piece, Spec, TensorFile, check_head, spec_bytes
from pyalpaca.checkpoint.container.tree import shown

Value: TypeAlias = "str | bool | np.generic | np.ndarray[Any, Any] | list[str]"
"""What a key may stand for: numpy's types say which number it is; an array is one of numbers, or a list of strings."""

_MAGIC = b"GGUF"
_VERSION = 3
_ALIGNMENT = 32
_OLD_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg")
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_CODES = {dtype: code for code, dtype in _NUMBERS.items()}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MOST_STRINGS = 1 << 22  # LLaMA 3 has 409,000; each takes time and memory, so a hostile file can't have any number
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufFile:
    """An opened file, or a split model's files as one. Quantized tensors are read dequantized, as float32.

    types: {name: ggml's type}, such as `F16` or `Q8_0`.
    """

    tensors: TensorFile
    metadata: Mapping[str, Value]
    types: Mapping[str, str]


class _Header:
    """Reads on through a header; no length is believed before it was held against what is left of the file."""

    def __init__(self, path: Path, data: np.ndarray[Any, Any]) -> None:
        self.path, self.data, self.view, self.at, self.strings = path, data, data.data, 0, 0

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what}; download it again")

    def take(self, size: int) -> int:
        """Where the next `size` bytes begin."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.view):
            raise self.error(f"its header at byte {start:,} asks for {size:,} bytes, the file has {len(self.view):,}")
        return start

    def integer(self, form: str) -> int:
        number: int = struct.unpack_from(form, self.view, self.take(struct.calcsize(form)))[0]
        return number

    def string(self) -> str:
        self.strings += 1
        if self.strings > _MOST_STRINGS:
            raise self.error(f"its header holds more than {_MOST_STRINGS:,} strings, no LLaMA model has as many")
        length = self.integer("<Q")
        start = self.take(length)
        # Bytes that are no UTF-8 (a token may be half a character) come back as they were if they are written again.
        return str(self.view[start : self.at], "utf-8", "surrogateescape")

    def numbers(self, code: int, count: int) -> np.ndarray[Any, Any]:
        """A view of the file, not a copy."""
        if code == _BOOL:
            return self.numbers(0, count) != 0
        if code not in _NUMBERS:
            raise self.error(f"byte {self.at:,} names {code} as the type of a value, expected 0 to 12, and no array of arrays")
        start = self.take(count * _NUMBERS[code].itemsize)
        return self.data[start : self.at].view(_NUMBERS[code])

    def value(self) -> Value:
        code = self.integer("<I")
        if code == _STRING:
            return self.string()
        if code != _ARRAY:
            number: np.generic = self.numbers(code, 1)[0]
            return bool(number) if code == _BOOL else number
        code, count = self.integer("<I"), self.integer("<Q")
        return [self.string() for _ in range(count)] if code == _STRING else self.numbers(code, count)


def open_gguf_file(path: Path) -> GgufFile:
    """Open one GGUF file; ValueError or FileNotFoundError says what is wrong with it."""
    check_head(path, "a GGUF file")
    whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    header = _Header(path, whole.numpy())
    _check_version(header)
    num_tensors, num_values = header.integer("<Q"), header.integer("<Q")
    metadata: dict[str, Value] = {}
    for _ in range(num_values):
        key = header.string()
        if key in metadata:
            raise header.error(f"its header has the key '{shown(key)}' twice")
        metadata[key] = header.value()
    table = _tensor_table(header, num_tensors)
    alignment = metadata.get("general.alignment", np.uint32(_ALIGNMENT))
    if not isinstance(alignment, np.integer) or alignment < 8 or alignment & (alignment - 1):
        raise header.error(f"general.alignment is {shown(str(alignment))}, expected a power of two from 8 on")
    begin = header.at + -header.at % int(alignment)
    types = {name: _type_name(path, name, code) for name, (_, code, _) in table.items()}
    stored, places = {}, {}
    for name, (shape, _, offset) in table.items():
        stored[name], places[name] = _stored(header, name, shape, types[name]), begin + offset
        end = places[name] + spec_bytes(stored[name])
        if offset % int(alignment) or end > len(header.view):
            raise header.error(
                f"{shown(name)} takes the bytes {places[name]:,} to {end:,}, but a tensor begins at a multiple of "
                f"{alignment} and the file has {len(header.view):,} bytes"
            )

    def read(name: str, piece: Piece | None) -> Tensor:
        shape, dtype = stored[name]
        data = whole[places[name] : places[name] + spec_bytes(stored[name])].view(dtype).view(shape)
        return decode(data, types[name], piece)

    shapes = {name: shape for name, (shape, _, _) in table.items()}
    dtypes = {name: PLAIN.get(kind, torch.float32) for name, kind in types.items()}
    return GgufFile(TensorFile(path, shapes, dtypes, read), metadata, types)


def _tensor_table(header: _Header, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """{name: (shape, number of its type, offset)}; the file has the innermost dimension first."""
    table = {}
    for _ in range(count):
        name = header.string()
        if name in table:
            raise header.error(f"its header has the tensor '{shown(name)}' twice")
        dims = header.integer("<I")
        if not 0 < dims <= 4:
            raise header.error(f"'{shown(name)}' has {dims} dimensions, expected 1 to 4")
        shape = tuple(reversed([header.integer("<Q") for _ in range(dims)]))
        table[name] = shape, header.integer("<I"), header.integer("<Q")
    return table


def _check_version(header: _Header) -> None:
    header.take(4)
    magic = bytes(header.view[:4])
    if magic != _MAGIC:
        what = "is a GGML file from before GGUF" if magic in _OLD_MAGICS else f"begins with {magic!r}"
        raise ValueError(f"{header.path}: {what}, expected a GGUF file; convert or download the model anew")
    version = header.integer("<I")
    if version not in (2, 3):
        what = "is big-endian" if version and version & 0xFFFF == 0 else f"is of GGUF version {version}"
        raise ValueError(f"{header.path}: {what}, expected little-endian, version 2 or 3; convert or download the model anew")


def _type_name(path: Path, name: str, code: int) -> str:
    kind = type_name(code)
    if kind is None:
        raise ValueError(
            f"{path}: {shown(name)} is of type {code}, which the gguf package can't decode, expected for instance F16 or Q4_K; "
            "`pip install -U gguf`, or take the model in another type"
        )
    return kind


def _stored(header: _Header, name: str, shape: tuple[int, ...], kind: str) -> Spec:
    if min(shape) < 1 or math.prod(shape) > 1 << 62:
        raise header.error(f"{shown(name)} has the shape {shape}, expected positive dimensions")
    if shape[-1] % block_size(kind):
        raise header.error(
            f"{shown(name)} has rows of {shape[-1]}, expected a multiple of {block_size(kind)}, the block of {kind}"
        )
    return stored_spec(shape, kind)


def open_gguf_files(path: Path) -> GgufFile:
    """Open a GGUF file, with its siblings if it is one part of a model split by llama.cpp (`-00001-of-00003.gguf`).

    ValueError or FileNotFoundError says what is wrong with them.
    """
    file = open_gguf_file(path)
    split = file.metadata.get("split.count")
    count = int(split) if isinstance(split, np.integer) else 1
    if count <= 1:
        return file
    match = _PART.fullmatch(path.name)
    if match is None or int(match[2]) != count:
        raise ValueError(
            f"{path}: is one of {count} parts, expected a name such as model-00001-of-{count:05d}.gguf to find the others by; "
            "rename the parts"
        )
    parts = [open_gguf_file(path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf")) for i in range(1, count + 1)]
    owner: dict[str, TensorFile] = {}
    for part in parts:
        if twice := owner.keys() & part.types.keys():
            raise ValueError(
                f"{part.tensors.path}: holds {shown(min(twice))}, as another part does; the parts are of different models"
            )
        owner |= dict.fromkeys(part.types, part.tensors)
    total = parts[0].metadata.get("split.tensors.count")
    if isinstance(total, np.integer) and total != len(owner):
        raise ValueError(f"{path}: {len(owner)} tensors are in its {count} parts, expected {total}; download the parts again")
    joined = replace(
        parts[0].tensors,
        shapes={name: tensors.shapes[name] for name, tensors in owner.items()},
        dtypes={name: tensors.dtypes[name] for name, tensors in owner.items()},
        read=lambda name, piece: owner[name].read(name, piece),
    )
    return GgufFile(joined, parts[0].metadata, {name: kind for part in parts for name, kind in part.types.items()})


def gguf_layout(name: str, metadata: Mapping[str, Value], tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> FileLayout:
    """Where everything goes in a GGUF file of version 3.

    tensors: {name: (shape, ggml's type)} in the file's order; `encode` makes what is stored there.
    """
    specs, places, infos, offset = {}, {}, b"", 0
    for key, (shape, kind) in tensors.items():
        specs[key] = stored_spec(shape, kind)
        places[key] = offset
        infos += _text(key) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), type_code(kind), offset)
        offset += spec_bytes(specs[key]) + -spec_bytes(specs[key]) % _ALIGNMENT
    pairs = b"".join(_text(key) + _typed(value) for key, value in metadata.items())
    head = _MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)) + pairs + infos
    begin = len(head) + -len(head) % _ALIGNMENT
    return FileLayout(
        name, begin + offset, specs, {key: begin + place for key, place in places.items()}, lambda crcs: [(0, head)], False
    )


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _typed(value: Value) -> bytes:
    """A value, its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    numbers = np.asarray(value)
    code = _BOOL if numbers.dtype == np.bool_ else _CODES[numbers.dtype.newbyteorder("<")]
    kind = struct.pack("<I", code) if numbers.ndim == 0 else struct.pack("<IIQ", _ARRAY, code, len(numbers))
    return kind + numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).tobytes()
