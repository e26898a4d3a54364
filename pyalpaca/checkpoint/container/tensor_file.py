"""What every kind of tensor file has in common once it is opened, and how a file that is something else is recognised."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Piece = tuple[int, int, int]
"""(dim, start, stop): rows or columns [start, stop) of a whole tensor."""

Spec = tuple[tuple[int, ...], torch.dtype]
"""(shape, dtype) of a tensor that is not there yet."""


@dataclass(frozen=True)
class TensorFile:
    """The tensors of one file of any kind: shapes and dtypes at once, data when `read(name, piece)` asks for it.

    What `read` returns may be a view of the mapped file: not to be changed in place.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str, Piece | None], Tensor]


def dtype_name(dtype: torch.dtype) -> str:
    """`float16` for torch.float16."""
    return str(dtype).removeprefix("torch.")


def spec_bytes(spec: Spec) -> int:
    """Bytes of a tensor of this shape and type."""
    return torch.Size(spec[0]).numel() * spec[1].itemsize


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, row-major, little-endian."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def check_head(path: Path, expected: str) -> None:
    """FileNotFoundError or ValueError if `path` is absent, empty, an HTML page or a Git LFS pointer instead of `expected`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found, expected {expected}; check the path or download it")
    with path.open("rb") as file:
        head = file.read(64)
    text = head.lstrip().lower()
    if not head:
        raise ValueError(f"{path}: is empty, expected {expected}; download it again")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(f"{path}: is an HTML page, expected {expected}; download the file itself, not the page about it")
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: is a Git LFS pointer, expected {expected}; run `git lfs pull` or download the file itself")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if it is a page, not JSON, or not an object."""
    check_head(path, "JSON")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value
