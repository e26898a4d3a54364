"""The cache of keys and values: laid out so that decoding reads it at the memory's speed."""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

from pyalpaca.model import LayerCache, LlamaConfig

_HUGE_PAGE = 2**21


def new_cache(
    config: LlamaConfig, length: int, dtype: torch.dtype, device: torch.device, *, batch: int = 1, parts: int = 1
) -> list[LayerCache]:
    """An empty cache of each layer for `length` positions, (B, length, K, d) each; int8 has scales beside it.

    parts: tensor-parallel ranks, among which the kv heads are divided. On a CPU a head's positions lie one after the other in
    memory, elsewhere a position's heads.
    """
    heads = config.num_kv_heads // parts
    shape = (batch, heads, length) if device.type == "cpu" else (batch, length, heads)

    def buffer(dtype: torch.dtype, *width: int) -> Tensor:
        made = _zeros((*shape, *width), dtype, device)
        return made.transpose(1, 2) if device.type == "cpu" else made

    def values() -> Tensor:
        return buffer(dtype, config.head_dim)

    def scales() -> Tensor | None:
        return buffer(torch.float32) if dtype == torch.int8 else None

    return [LayerCache(values(), values(), 0, scales(), scales()) for _ in range(config.num_layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros on huge pages where the system has them: a processor core reads those nearly twice as fast as small ones."""
    size = math.prod(shape) * dtype.itemsize
    if sys.platform != "linux" or device.type != "cpu" or size < _HUGE_PAGE:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE)
    with suppress(OSError):  # a kernel built without them: small pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)
