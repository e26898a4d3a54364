"""A LLaMA's config as llama.cpp's metadata, and back.

LLaMA 3's rope scaling is no metadata there, but a tensor: what each frequency is divided by. The record that gives just these
factors is looked for among those that published models have. Source: convert_hf_to_gguf.py of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyalpaca.checkpoint.container.gguf_file import GgufFile, Value
from pyalpaca.model import LlamaConfig

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor of LLaMA 3's rope scaling, float32 (head_dim / 2)."""

_EMBED, _HEAD = "token_embd.weight", "output.weight"
_LOW, _HIGH = 1.0, 4.0  # LLaMA 3's bounds, in turns over the original context
_ORIGINALS = (8192, *(2**n for n in range(5, 21)))


def config_from_gguf(file: GgufFile) -> LlamaConfig:
    """The config of a file's model. ValueError names what is missing, or what no LLaMA has."""
    values = file.metadata
    architecture = values.get("general.architecture")
    if str(architecture) != "llama":
        raise ValueError(f"its architecture is {_short(architecture)}, not 'llama'")
    if _number(values, "expert_count", 0):
        raise ValueError(f"is a mixture of {_number(values, 'expert_count')} experts")
    shape = file.tensors.shapes.get(_EMBED, ())
    if len(shape) != 2:
        raise ValueError(f"no matrix {_EMBED}")
    heads, hidden = _number(values, "attention.head_count"), _number(values, "embedding_length")
    head_dim = _number(values, "attention.key_length", hidden // heads if heads else 0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _number(values, key, head_dim) != head_dim:
            raise ValueError(f"llama.{key} is {_number(values, key)}, but the heads have {head_dim} dimensions")
    theta = float(_number(values, "rope.freq_base", 10000.0))
    return LlamaConfig(
        vocab_size=shape[0],
        hidden_size=hidden,
        intermediate_size=_number(values, "feed_forward_length"),
        num_layers=_number(values, "block_count"),
        num_heads=heads,
        num_kv_heads=_number(values, "attention.head_count_kv", heads),
        head_dim=head_dim,
        norm_eps=float(_number(values, "attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, head_dim, theta),
        max_positions=_number(values, "context_length", 2048),
        tie_embeddings=_HEAD not in file.types,
    )


def _number(values: Mapping[str, Value], key: str, default: Any = None) -> Any:
    """llama.{key}, a Python number. A list, one number a layer, must hold a single one: LLaMA's layers are all alike."""
    value = values.get(f"llama.{key}")
    if value is None:
        if default is None:
            raise ValueError(f"llama.{key} missing")
        return default
    if isinstance(value, np.ndarray):
        if not value.size or (value != value[0]).any():
            raise ValueError(f"llama.{key} differs between layers")
        value = value[0]
    if isinstance(value, np.floating):
        return float(str(value))  # as it was written, 1e-06, not float32's nearest, 9.99999997e-07
    if isinstance(value, np.integer):
        return int(value)
    raise ValueError(f"llama.{key} is {_short(value)}, expected a number")


def _short(value: object) -> str:
    return f"{value!r:.60}"


def _rope_scaling(file: GgufFile, head_dim: int, theta: float) -> dict[str, Any] | None:
    kind = str(file.metadata.get("llama.rope.scaling.type", "linear"))
    factor = float(_number(file.metadata, "rope.scaling.factor", _number(file.metadata, "rope.scale_linear", 1.0)))
    scaling = None if kind == "none" or factor in (0.0, 1.0) else {"rope_type": kind, "factor": factor}
    if ROPE_FACTORS not in file.types:
        return scaling
    factors = file.tensors.read(ROPE_FACTORS, None)
    if factors.shape != (head_dim // 2,) or scaling is not None:
        raise ValueError(f"{ROPE_FACTORS} does not fit the other metadata on rotary embeddings")
    return _llama3_scaling(factors.float(), theta)


def _llama3_scaling(factors: Tensor, theta: float) -> dict[str, Any] | None:
    """The record of LLaMA 3's scaling that gives these factors; None if they scale nothing."""
    if bool((factors == 1).all()):
        return None
    longest = theta ** (2 / (2 * len(factors)) - 1) / (2 * math.pi)  # turns a position of the slowest pair
    for original in _ORIGINALS:
        smooth = min(max((original * longest - _LOW) / (_HIGH - _LOW), 0.0), 1.0)
        rest = 1 / float(factors[-1]) - smooth
        if smooth == 1.0 or rest <= 0:
            continue
        scaling = {
            "rope_type": "llama3",
            "factor": float(f"{(1 - smooth) / rest:.5g}"),
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": original,
        }
        if torch.allclose(llama3_factors(scaling, 2 * len(factors), theta), factors, rtol=1e-5):
            return scaling
    raise ValueError(f"{ROPE_FACTORS} holds other factors than LLaMA 3's scaling gives")


def llama3_factors(scaling: Mapping[str, Any], head_dim: int, theta: float) -> Tensor:
    """What LLaMA 3's scaling divides each frequency by, float32 (head_dim / 2)."""
    factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    turns = original * frequency / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return torch.where(smooth == 0, factor, 1 / ((1 - smooth) / factor + smooth))


def config_metadata(config: LlamaConfig) -> dict[str, Value]:
    """The `llama.` keys of a model, in the order and of the types that llama.cpp's converter writes."""
    values: dict[str, Value] = {
        "llama.block_count": np.uint32(config.num_layers),
        "llama.context_length": np.uint32(config.max_positions),
        "llama.embedding_length": np.uint32(config.hidden_size),
        "llama.feed_forward_length": np.uint32(config.intermediate_size),
        "llama.attention.head_count": np.uint32(config.num_heads),
        "llama.attention.head_count_kv": np.uint32(config.num_kv_heads),
    }
    scaling = config.rope_scaling
    if scaling is not None and "factor" in scaling and scaling.get("rope_type", scaling.get("type")) == "linear":
        values["llama.rope.scaling.type"] = "linear"
        values["llama.rope.scaling.factor"] = np.float32(scaling["factor"])
    return values | {
        "llama.rope.freq_base": np.float32(config.rope_theta),
        "llama.attention.layer_norm_rms_epsilon": np.float32(config.norm_eps),
        "llama.attention.key_length": np.uint32(config.head_dim),
        "llama.attention.value_length": np.uint32(config.head_dim),
        "llama.vocab_size": np.uint32(config.vocab_size),
        "llama.rope.dimension_count": np.uint32(config.head_dim),
    }
