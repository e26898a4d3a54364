"""safetensors files: opened lazily by the reference library, and laid out before they are written."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from pyalpaca.checkpoint.container.layout import FileLayout
from pyalpaca.checkpoint.container.tensor_file import Piece, Spec, TensorFile, check_head, spec_bytes

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def open_safetensors(path: Path) -> TensorFile:
    """Open a safetensors file; ValueError or FileNotFoundError says what is wrong with it."""
    check_head(path, "a safetensors file")
    try:
        handle = safetensors.safe_open(str(path), framework="pt")
    except safetensors.SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: can't be read as safetensors ({error}; the file has {size} bytes); download it again"
        ) from None
    shapes, dtypes = {}, {}
    for name in list(handle.keys()):
        entry = handle.get_slice(name)
        if entry.get_dtype() not in _DTYPES:
            raise ValueError(f"{path}: {name} is {entry.get_dtype()}, expected one of {', '.join(_DTYPES)}")
        shapes[name] = tuple(entry.get_shape())
        dtypes[name] = _DTYPES[entry.get_dtype()]

    def read(name: str, piece: Piece | None) -> Tensor:
        tensor: Tensor
        if piece is None:
            tensor = handle.get_tensor(name)
        else:
            index = [slice(None)] * len(shapes[name])
            index[piece[0]] = slice(piece[1], piece[2])
            tensor = handle.get_slice(name)[tuple(index)]
        return tensor

    return TensorFile(path, shapes, dtypes, read)


def safetensors_layout(name: str, specs: Mapping[str, Spec], *, needs_checksums: bool = False) -> FileLayout:
    """Where the tensors of a safetensors file go, as the reference implementation has it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide types first, as in the reference: every tensor is then aligned to its own size.
    for key in sorted(specs, key=lambda n: -specs[n][1].itemsize):
        shape, dtype = specs[key]
        end = offset + spec_bytes(specs[key])
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    places = {key: len(head) + header[key]["data_offsets"][0] for key in specs}
    return FileLayout(name, len(head) + offset, specs, places, lambda crcs: [(0, head)], needs_checksums)
