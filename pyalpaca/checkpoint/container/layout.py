"""A file before it is written: every byte's place is known before any tensor is read, so tensors may be written in any order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pyalpaca.checkpoint.container.tensor_file import Spec

Patch = tuple[int, bytes]
"""(offset, bytes)."""


@dataclass(frozen=True)
class FileLayout:
    """One tensor file that is to be written.

    name: path relative to the output folder, with `/`.
    size: bytes of the finished file.
    specs: {key: (shape, dtype)} of its tensors, in the file's own order.
    places: {key: offset in bytes of the tensor's data}; the data are row-major and little-endian.
    seal: {key: crc32 of the tensor's bytes} -> all that is not tensor data (headers, tables, padding that is not zero).
    needs_checksums: whether `seal`, or what is written beside the file, uses the checksums; else they may be 0.
    """

    name: str
    size: int
    specs: Mapping[str, Spec]
    places: Mapping[str, int]
    seal: Callable[[Mapping[str, int]], list[Patch]]
    needs_checksums: bool = True
