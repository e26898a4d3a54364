"""The four published LLaMA sizes by name: what users type and what the original tools look up."""

from __future__ import annotations

from dataclasses import dataclass

from pyalpaca.model import LlamaConfig


@dataclass(frozen=True)
class Size:
    """A published LLaMA-1 size: its shape, in how many shards Meta published it, and the epsilon in Meta's params.json."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    num_shards: int
    norm_eps: float


SIZES = {
    "7B": Size(32, 4096, 32, 11008, 1, 1e-6),
    "13B": Size(40, 5120, 40, 13824, 2, 1e-6),
    "33B": Size(60, 6656, 52, 17920, 4, 1e-6),
    "65B": Size(80, 8192, 64, 22016, 8, 1e-5),
}


def size_by_name(name: str) -> Size | None:
    """The size that a user calls `name`; Meta's own name of 33B is 30B."""
    return SIZES.get({"30B": "33B"}.get(name.upper(), name.upper()))


def size_of(config: LlamaConfig) -> tuple[str, Size] | None:
    """The published size that a model has, or None."""
    shape = (config.num_layers, config.hidden_size, config.num_heads, config.intermediate_size)
    for name, size in SIZES.items():
        same = shape == (size.num_layers, size.hidden_size, size.num_heads, size.intermediate_size)
        if same and config.num_kv_heads == config.num_heads:
            return name, size
    return None
