"""A model whose projections are stored as integers: the tree holds a scale beside such a weight, and `forward` reads both."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pyalpaca.model.params import Tree, flatten, load, unflatten
from pyalpaca.model.sharding import Parameter
from pyalpaca.ops import quantize


def load_quantized(
    table: Iterable[Parameter],
    read: Callable[[Parameter, tuple[int, int, int] | None], Tensor],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    rank: int = 0,
    ranks: int = 1,
    *,
    bits: int,
    group: int | None = None,
) -> Tree:
    """As `load`, but each projection and the head become integers (see `pyalpaca.ops.quantize`), one weight after the other.

    Embedding, norms and a tied head stay as they are. ValueError that names the parameter which can't be quantised.
    """
    flat: dict[str, Tensor] = {}
    for p in table:
        tensor = flatten(load([p], read, torch.float32 if is_projection(p) else dtype, device, rank, ranks))[p.path]
        if not is_projection(p):
            flat[p.path] = tensor
            continue
        stem = p.path.removesuffix(".weight")
        try:
            flat[f"{stem}.weight"], flat[f"{stem}.scale"] = quantize(tensor, bits, group)
        except ValueError as error:
            raise ValueError(f"{p.name}: {error}") from None
    return unflatten(flat)


def is_projection(parameter: Parameter) -> bool:
    """Whether a parameter multiplies activations: a projection of a layer, or the head."""
    return parameter.path.endswith(".weight") or parameter.path == "head"
