"""Tensor files of both kinds, opened lazily: torch.save's (.pth, .bin, .pt) and safetensors; errors say what a file really is."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from pyalpaca.checkpoint.container.tensor_file import Piece, TensorFile, dtype_name, raw_bytes
from pyalpaca.model import whole_slice

_SAFE_DTYPES = {
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
_TORCH_DTYPES = {name: dtype for dtype, name in _SAFE_DTYPES.items()}


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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def open_torch(path: Path) -> dict[str, Any]:
    """What torch.save wrote, nested dicts of tensors mapped from the file and read when touched; nothing in it is executed.

    Files of torch before 1.6 (not a zip) are read whole. Raises ValueError naming a file that is truncated or something else.
    """
    check_head(path, "a file written by torch.save")
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip and not _has_directory(path):
        raise ValueError(
            f"{path}: is truncated ({path.stat().st_size} bytes, the end of the archive is missing); download it again"
        )
    try:
        content = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: can't be read as tensors saved by torch.save ({type(error).__name__}: {reason}); "
            f"it is damaged or holds more than tensors, download it again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    return content


def _has_directory(path: Path) -> bool:
    """Whether a zip archive has its end, the table of what is in it."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # a table that makes no sense
        return False


def open_tensors(path: Path) -> TensorFile:
    """Open a .safetensors file or one written by torch.save; ValueError or FileNotFoundError says what is wrong with it."""
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    tensors = {key: value for key, value in open_torch(path).items() if isinstance(value, Tensor)}
    return TensorFile(
        path,
        {key: tuple(t.shape) for key, t in tensors.items()},
        {key: t.dtype for key, t in tensors.items()},
        lambda name, piece: whole_slice(tensors[name], piece),
    )


def _open_safetensors(path: Path) -> TensorFile:
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
        if entry.get_dtype() not in _TORCH_DTYPES:
            raise ValueError(f"{path}: {name} is {entry.get_dtype()}, expected one of {', '.join(_TORCH_DTYPES)}")
        shapes[name] = tuple(entry.get_shape())
        dtypes[name] = _TORCH_DTYPES[entry.get_dtype()]

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


def write_safetensors(
    path: Path, specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file one tensor at a time.

    specs: {name: (shape, dtype)} of all that will come; `tensors` must yield just these, in any order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide types first, as the reference implementation has it: every tensor is then aligned to its own size.
    for name in sorted(specs, key=lambda n: -specs[n][1].itemsize):
        shape, dtype = specs[name]
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _SAFE_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = set()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            shape, dtype = specs[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise AssertionError(
                    f"{name}: {tuple(tensor.shape)} {dtype_name(tensor.dtype)} was announced as {shape} {dtype_name(dtype)}"
                )
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(raw_bytes(tensor))
            written.add(name)
        assert written == set(specs), f"announced but not given: {sorted(set(specs) - written)[:3]}"
        file.truncate(8 + len(text) + offset)
