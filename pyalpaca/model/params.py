"""Parameter trees: nested dicts with tensors at the leaves, addressed by dotted paths; and how a model's are initialised."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyalpaca.model.sharding import Parameter, shard

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """{dotted path: tensor}, in the tree's own order."""
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Tensor]) -> Tree:
    """The inverse of `flatten`."""
    tree: Tree = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def tree_map(function: Callable[[Tensor], Tensor], tree: Mapping[str, Any]) -> Tree:
    """The tree with `function` applied to every leaf."""
    return {k: tree_map(function, v) if isinstance(v, Mapping) else function(v) for k, v in tree.items()}


def initial(parameter: Parameter, seed: int, std: float = 0.02) -> Tensor:
    """The initial value of a whole parameter, fp32: normal(0, std); norms 1; LoRA's B 0, its A uniform as in PEFT.

    It depends on the seed and the parameter's name alone, so every layout starts from the same numbers.
    """
    if len(parameter.shape) == 1:
        return torch.ones(parameter.shape)
    if parameter.path.endswith(".lora_b"):
        return torch.zeros(parameter.shape)
    generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(parameter.path.encode()))
    if parameter.path.endswith(".lora_a"):
        # PEFT: kaiming_uniform_ with a = sqrt(5), which is uniform in +-1/sqrt(fan_in).
        bound = parameter.shape[1] ** -0.5
        return torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
    return torch.empty(parameter.shape).normal_(0.0, std, generator=generator)


def init(
    table: Iterable[Parameter],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rank: int = 0,
    ranks: int = 1,
) -> Tree:
    """The parameter tree of a table (a whole model's or a stage's), cut for one tensor-parallel rank."""
    return load(table, lambda p, piece: whole_slice(initial(p, seed), piece), dtype, device, rank, ranks)


def whole_slice(tensor: Tensor, piece: tuple[int, int, int] | None) -> Tensor:
    """The (dim, start, stop) piece of a whole tensor, or all of it."""
    return tensor if piece is None else tensor.narrow(piece[0], piece[1], piece[2] - piece[1])


def load(
    table: Iterable[Parameter],
    read: Callable[[Parameter, tuple[int, int, int] | None], Tensor],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    rank: int = 0,
    ranks: int = 1,
) -> Tree:
    """The parameter tree of a table, each leaf from `read(parameter, piece)`, as a contiguous copy of its own."""

    def leaf(p: Parameter) -> Tensor:
        return read(p, shard(p, rank, ranks)).to(device, dtype, copy=True, memory_format=torch.contiguous_format)

    return unflatten({p.path: leaf(p) for p in table})
