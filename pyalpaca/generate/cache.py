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

    parts: tensor-parallel ranks, among which the kv heads are divided. A head's positions lie one after the other in memory.
    """
    shape = (batch, config.num_kv_heads // parts, length, config.head_dim)

    def values() -> Tensor:
        return _zeros(shape, dtype, device).transpose(1, 2)

    def scales() -> Tensor | None:
        return _zeros(shape[:3], torch.float32, device).transpose(1, 2) if dtype == torch.int8 else None

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
