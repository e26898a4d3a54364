"""ggml's tensor types: plain ones, and those that are quantized in blocks along a row, which the `gguf` package computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyalpaca.checkpoint.container.tensor_file import Piece, Spec

PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Types whose elements are stored one by one."""

_CHUNK = 1 << 20  # elements computed at once: some 25 MB with all that is needed on the way


def type_name(code: int) -> str | None:
    """The name of the type with this number, such as `F16` or `Q8_0`; None if it can't be read."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(code)
        if kind.name not in PLAIN:
            gguf.quants.dequantize(np.zeros((1, _block(kind.name)[1]), np.uint8), kind)
        return kind.name
    except (ValueError, NotImplementedError):
        return None


def type_code(kind: str) -> int:
    """The inverse of `type_name`."""
    import gguf

    return int(gguf.GGMLQuantizationType[kind])


def block_size(kind: str) -> int:
    """Elements of a block of this type; a row is a whole number of blocks."""
    return 1 if kind in PLAIN else _block(kind)[0]


def _block(kind: str) -> tuple[int, int]:
    """Elements and bytes of a block."""
    import gguf

    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def stored_spec(shape: tuple[int, ...], kind: str) -> Spec:
    """What a tensor of this shape is in a file: itself, or rows of bytes (uint8) if the type is quantized."""
    if kind in PLAIN:
        return shape, PLAIN[kind]
    elements, size = _block(kind)
    return (*shape[:-1], shape[-1] // elements * size), torch.uint8


def encode(tensor: Tensor, kind: str) -> Tensor:
    """A tensor as a file stores it: cast, or quantized to just the bytes that gguf.quants.quantize gives."""
    if kind in PLAIN:
        return tensor.to(PLAIN[kind])
    import gguf

    shape, dtype = stored_spec(tuple(tensor.shape), kind)
    number = gguf.GGMLQuantizationType[kind]
    return _by_rows(tensor, shape, dtype, lambda rows: gguf.quants.quantize(rows.float().numpy(), number))


def decode(stored: Tensor, kind: str, piece: Piece | None = None) -> Tensor:
    """The values of a stored tensor or of a piece of it: in its own dtype, quantized ones as float32.

    Only the blocks that the piece touches are computed.
    """
    if kind in PLAIN:
        return stored if piece is None else stored.narrow(piece[0], piece[1], piece[2] - piece[1])
    import gguf

    elements, size = _block(kind)
    first, last = 0, stored.shape[-1] // size * elements
    if piece is not None and piece[0] == stored.ndim - 1:
        first, last = piece[1] % elements, piece[2] - piece[1] // elements * elements
        stored = stored[..., piece[1] // elements * size : -(-piece[2] // elements) * size]
    elif piece is not None:
        stored = stored.narrow(piece[0], piece[1], piece[2] - piece[1])
    shape = (*stored.shape[:-1], stored.shape[-1] // size * elements)
    number = gguf.GGMLQuantizationType[kind]
    values = _by_rows(stored, shape, torch.float32, lambda rows: gguf.quants.dequantize(rows.numpy(), number))
    return values[..., first:last]


def _by_rows(
    source: Tensor, shape: tuple[int, ...], dtype: torch.dtype, compute: Callable[[Tensor], np.ndarray[Any, Any]]
) -> Tensor:
    """compute(rows of source) -> rows of the result, some at a time, which bounds the memory that computing takes."""
    result = torch.empty(shape, dtype=dtype)
    count = math.prod(shape[:-1])
    if not result.numel():
        return result
    rows, made = source.reshape(count, -1), result.view(count, -1)
    step = max(1, _CHUNK // max(rows.shape[1], made.shape[1]))
    for start in range(0, count, step):
        with np.errstate(all="ignore"):  # infinities and NaN are taken as they come
            made[start : start + step] = torch.from_numpy(compute(rows[start : start + step]))
    return result
