"""The shape of a LLaMA model: one frozen record, read from and written to the two config files that users bring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class LlamaConfig:
    """Dimensions and constants of a LLaMA-shaped model (LLaMA 1, 2, 3 and what descends from them).

    `rope_scaling` is Hugging Face's record of the same name ({"rope_type": "linear" | "llama3", "factor": ..}) or None.
    `lora_scale` is alpha / r of the LoRA factors, where the parameter tree holds some.
    Raises ValueError for dimensions that contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    max_positions: int = 2048
    tie_embeddings: bool = False
    lora_scale: float = 1.0

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"model config: {field} is {value!r}, expected a positive whole number")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model config: {self.num_heads} heads can't share {self.num_kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"model config: head_dim is {self.head_dim}, rotary embeddings need an even number")
        if self.rope_scaling is not None and rope_type(self.rope_scaling) not in _ROPE_TYPES:
            raise ValueError(
                f"model config: rope scaling {rope_type(self.rope_scaling)!r} is not one of {', '.join(_ROPE_TYPES)}"
            )


def rope_type(scaling: Mapping[str, Any]) -> str:
    """The kind of a rope scaling record; older files spell the key `type`."""
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def config_from_hf(fields: Mapping[str, Any]) -> LlamaConfig:
    """LlamaConfig from the fields of a Hugging Face config.json, as transformers 4 or 5 writes it.

    ValueError names what is missing or not supported.
    """
    missing = [
        k
        for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if k not in fields
    ]
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)} missing; expected the config of a LLaMA model")
    for key, neutral in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if fields.get(key, neutral) != neutral:
            raise ValueError(f"config.json: {key} is {fields[key]!r}; LLaMA models have {neutral!r}, others are not supported")
    # transformers 5 moved rope_theta and rope_scaling into one record, rope_parameters.
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or fields.get("rope_theta") or 10000.0
    heads = fields["num_attention_heads"]
    return LlamaConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        rope_theta=float(theta),
        rope_scaling=rope if rope and rope_type(rope) != "default" else None,
        max_positions=int(fields.get("max_position_embeddings", 2048)),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )


def config_to_hf(config: LlamaConfig, dtype: str = "float16") -> dict[str, Any]:
    """The fields of a config.json that transformers 4 and 5 both read; `dtype` as in `float16`, without `torch.`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None if config.rope_scaling is None else dict(config.rope_scaling),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def config_from_meta(fields: Mapping[str, Any], vocab_size: int, intermediate_size: int) -> LlamaConfig:
    """LlamaConfig from Meta's params.json.

    params.json gives no vocabulary (-1) and only a rule for the feed-forward width, so both come from the tensors' shapes.
    """
    missing = [k for k in ("dim", "n_heads", "n_layers") if k not in fields]
    if missing:
        raise ValueError(f"params.json: {', '.join(missing)} missing; expected the params.json of a LLaMA model in Meta's format")
    heads = fields["n_heads"]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=fields["dim"],
        intermediate_size=intermediate_size,
        num_layers=fields["n_layers"],
        num_heads=heads,
        num_kv_heads=fields.get("n_kv_heads") or heads,
        head_dim=fields["dim"] // heads,
        norm_eps=float(fields.get("norm_eps", 1e-6)),
        rope_theta=float(fields.get("rope_theta", 10000.0)),
    )
