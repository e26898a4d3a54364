"""The one form that every layout reads into and writes from: Hugging Face's names and order, whole tensors, lazily."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyalpaca.checkpoint.container.tensor_file import Piece, dtype_name
from pyalpaca.model import LlamaConfig, parameters, whole_slice


@dataclass(frozen=True)
class Reader:
    """A checkpoint of any layout, opened: what it holds is known, nothing has been read.

    layout: `hf`, `meta`, `megatron`, `deepspeed`, `native` or `memory`.
    shapes, dtypes: of the whole canonical tensors, in Hugging Face's order.
    fetch: (name, piece) -> tensor; use `read`. What it returns may be a view of the mapped file: not to be changed in place.
    tokenizer: the folder that holds the tokenizer files, if any.
    fields: the config.json that came with it, fields we don't know included; empty where there was none.
    files: canonical name -> file name, for Hugging Face folders; in the files' own order.
    """

    layout: str
    path: Path
    config: LlamaConfig
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    fetch: Callable[[str, Piece | None], Tensor]
    tokenizer: Path | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Canonical names in Hugging Face's order."""
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.dtypes[name]

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """The tensor, or its (dim, start, stop) piece. KeyError if the model has no such tensor."""
        shape = self.shapes[name]
        if piece is not None and not 0 <= piece[1] <= piece[2] <= shape[piece[0]]:
            raise IndexError(f"{name}: piece {piece} lies outside of shape {shape}")
        return self.fetch(name, piece)


def parse_config(path: Path, parse: Callable[[], LlamaConfig], num_tensors: int) -> LlamaConfig:
    """`parse()`, its errors told as those of the file `path`; a damaged one may ask for more layers than there are tensors."""
    try:
        config = parse()
        if config.num_layers > num_tensors:
            raise ValueError(f"asks for {config.num_layers} layers, but the weights are {num_tensors} tensors")
        return config
    except (ValueError, TypeError, ArithmeticError, KeyError, AttributeError) as error:
        reason = str(error).removeprefix(f"{path.name}: ")
        raise ValueError(f"{path}: {reason}; expected the shape of a LLaMA model") from None


def check_shapes(where: Path, config: LlamaConfig, found: Mapping[str, tuple[int, ...]], hint: str) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the model in Hugging Face's order; ValueError if `found` lacks a tensor or holds one of another shape."""
    shapes = {p.name: p.shape for p in parameters(config)}
    missing = [name for name in shapes if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{where}: {missing[0]}{more} missing; {hint}")
    for name, shape in shapes.items():
        if tuple(found[name]) != shape:
            raise ValueError(f"{where}: {name} is {_dims(found[name])}, expected {_dims(shape)}; {hint}")
    return shapes


def _dims(shape: Sequence[int]) -> str:
    return " x ".join(str(n) for n in shape)


def memory_reader(
    config: LlamaConfig, tensors: Mapping[str, Tensor], tokenizer: Path | None = None, path: Path = Path("memory")
) -> Reader:
    """A Reader over {canonical name: whole tensor} held in memory; ValueError if the config asks for other tensors."""
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    shapes = check_shapes(path, config, found, "the tensors must be those of the config")
    extra = [name for name in tensors if name not in shapes]
    if extra:
        raise ValueError(f"{path}: {extra[0]} is no tensor of a LLaMA model with this config")
    dtypes = {name: tensors[name].dtype for name in shapes}
    return Reader("memory", path, config, shapes, dtypes, lambda name, piece: whole_slice(tensors[name], piece), tokenizer)


def cast(reader: Reader, dtype: torch.dtype | None) -> Reader:
    """A view of `reader` with every tensor in `dtype`; None changes nothing.

    Reading raises ValueError where a finite value becomes infinite: what is beyond 65504 has no place in float16.
    """
    if dtype is None:
        return reader

    def fetch(name: str, piece: Piece | None) -> Tensor:
        tensor = reader.fetch(name, piece)
        result = tensor.to(dtype)
        if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and bool((result.isinf() & tensor.isfinite()).any()):
            raise ValueError(
                f"{reader.path}: {name} holds {tensor.abs().max():g}, more than {dtype_name(dtype)} can; choose another dtype"
            )
        return result

    return replace(reader, dtypes=dict.fromkeys(reader.shapes, dtype), fetch=fetch)


def join(dim: int, parts: Sequence[tuple[int, Callable[[Piece | None], Tensor]]], piece: Piece | None) -> Tensor:
    """A tensor (or its piece) that lies in several files, cut along `dim`.

    parts: (length along `dim`, piece -> tensor) in order; only those that the piece touches are read.
    """
    if piece is None or piece[0] != dim:
        tensors = [read(piece) for _, read in parts]
    else:
        tensors, offset = [], 0
        for length, read in parts:
            start, stop = max(piece[1] - offset, 0), min(piece[2] - offset, length)
            if start < stop:
                tensors.append(read((dim, start, stop) if stop - start < length else None))
            offset += length
        if not tensors:  # an empty piece
            return parts[0][1]((dim, 0, 0))
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def joined_shape(
    where: Path, name: str, parts: Sequence[tuple[tuple[int, ...], torch.dtype]], dim: int | None
) -> tuple[int, ...]:
    """The shape of a tensor that lies in parts of these shapes and types, cut along `dim` (None: all parts hold the whole).

    ValueError if the parts don't fit together.
    """
    shape, dtype = list(parts[0][0]), parts[0][1]
    for other, kind in parts:
        alike = len(other) == len(shape) and all(a == b for i, (a, b) in enumerate(zip(other, shape, strict=True)) if i != dim)
        if not alike or kind != dtype or len(shape) != (1 if dim is None else 2):
            raise ValueError(
                f"{where}: {name} is {_dims(shape)} {dtype_name(dtype)} in one file and {_dims(other)} "
                f"{dtype_name(kind)} in another; the files must be of the same LLaMA model"
            )
    if dim is not None:
        shape[dim] = sum(other[dim] for other, _ in parts)
    return tuple(shape)


def own(tensor: Tensor) -> Tensor:
    """The tensor in memory of exactly its own size: torch.save would write the whole of what a view looks at."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor.detach()
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def total_bytes(reader: Reader, names: Iterable[str] | None = None) -> int:
    """Bytes of the tensors (all of them by default)."""
    chosen = reader.names if names is None else names
    return sum(torch.Size(reader.shapes[n]).numel() * reader.dtypes[n].itemsize for n in chosen)


DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
