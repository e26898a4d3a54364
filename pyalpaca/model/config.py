"""The shape of a LLaMA model: one frozen record, read from and written to the two config files that users bring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""What a rope scaling record of each kind must hold."""


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
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling)


def rope_type(scaling: Mapping[str, Any]) -> str:
    """The kind of a rope scaling record; older files spell the key `type`."""
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _check_rope_scaling(scaling: Mapping[str, Any]) -> None:
    kind = rope_type(scaling)
    if kind not in _ROPE_FIELDS:
        known = ", ".join(_ROPE_FIELDS)
        raise ValueError(f"model config: rope scaling {kind!r} is not one of {known}, its positions can't be computed")
    for key in _ROPE_FIELDS[kind]:
        if not _is_positive(scaling.get(key)):
            raise ValueError(
                f"model config: {key} of the {kind} rope scaling is {scaling.get(key)!r}, expected a positive number"
            )
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        raise ValueError(f"model config: high_freq_factor {high} of the rope scaling is not above low_freq_factor {low}")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


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
    if fields.get("model_type", "llama") not in ("llama", "mistral"):  # others scale, skip or turn more with the same tensors
        raise ValueError(f"config.json: model_type is {fields['model_type']!r}; expected llama, others are not supported")
    if fields.get("quantization_config"):
        raise ValueError("config.json: quantization_config says that the weights are quantized; convert them to fp16 first")
    theta, scaling = _rope_from_hf(fields)
    heads = fields["num_attention_heads"]
    return LlamaConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads") or heads,
        head_dim=fields.get("head_dim") or _share("config.json: hidden_size", fields["hidden_size"], heads),
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=int(fields.get("max_position_embeddings", 2048)),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )


def _rope_from_hf(fields: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) of a config.json: transformers 5 moved rope_theta and rope_scaling into one record, rope_parameters."""
    rope = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None) or fields.get("rope_theta") or 10000.0
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"config.json: rope_parameters differ between kinds of layers ({', '.join(rope)}), LLaMA's do not")
    for part in (fields.get("partial_rotary_factor"), rope.pop("partial_rotary_factor", None)):
        if part not in (None, 1):
            raise ValueError(f"config.json: partial_rotary_factor is {part!r}; LLaMA models turn the whole head")
    kind = rope_type(rope)
    if kind == "default":
        return float(theta), None
    scaling = {"rope_type": kind, **{key: value for key, value in rope.items() if key not in ("type", "rope_type")}}
    if kind == "llama3":  # where transformers takes it from when the record lacks it
        beside = fields.get("original_max_position_embeddings") or fields.get("max_position_embeddings")
        scaling.setdefault("original_max_position_embeddings", beside)
    return float(theta), scaling


def _share(what: str, size: Any, heads: Any) -> int:
    """size / heads; ValueError where that is no whole number. What is no number at all is left to LlamaConfig to name."""
    if not isinstance(size, int) or not isinstance(heads, int) or heads <= 0:
        return 0
    if size % heads:
        raise ValueError(f"{what} {size} can't be divided by {heads} heads, and no head_dim is given")
    return size // heads


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


# Meta's loaders know these by the model; a params.json says only that the rope is scaled (llama-models, models/llama3/model.py).
# Its LLaMA 3.2 of 1B and 3B were published for transformers with a factor of 32.
_META_ROPE = {"low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
_META_FACTOR, _META_HIGH = 8.0, 4.0
_META_FACTOR_OF = {(2048, 16): 32.0, (3072, 28): 32.0}
_META_FOREIGN = ("moe", "moe_args", "quantization_args", "lora_args", "use_qk_norm", "nope_layer_interval")


def config_from_meta(fields: Mapping[str, Any], vocab_size: int, intermediate_size: int) -> LlamaConfig:
    """LlamaConfig from Meta's params.json, of LLaMA 1 to 3.

    vocab_size, intermediate_size: of the tensors: LLaMA 1 and 2 give no vocabulary (-1), and all only a rule for the
    feed-forward width. ValueError names what is missing, contradicts the tensors or is not supported.
    """
    if isinstance(fields.get("model"), Mapping):  # so in some of LLaMA 3.1, as transformers' converter knows
        fields = fields["model"]
    missing = [k for k in ("dim", "n_heads", "n_layers") if k not in fields]
    if missing:
        raise ValueError(f"params.json: {', '.join(missing)} missing; expected the params.json of a LLaMA model in Meta's format")
    for key in _META_FOREIGN:
        if fields.get(key):
            raise ValueError(f"params.json: {key} is {fields[key]!r}; LLaMA 1 to 3 have none, others are not supported")
    given = fields.get("vocab_size")
    if given not in (None, -1, vocab_size):
        raise ValueError(
            f"params.json: vocab_size is {given}, but output.weight has {vocab_size} rows; set vocab_size to {vocab_size}"
        )
    heads = fields["n_heads"]
    scaling = None
    if fields.get("use_scaled_rope"):
        usual = _META_FACTOR_OF.get((fields["dim"], fields["n_layers"]), _META_FACTOR)
        scaling = {
            "rope_type": "llama3",
            "factor": fields.get("rope_scaling_factor") or usual,
            "high_freq_factor": fields.get("rope_high_freq_factor") or _META_HIGH,
            **_META_ROPE,
        }
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=fields["dim"],
        intermediate_size=intermediate_size,
        num_layers=fields["n_layers"],
        num_heads=heads,
        num_kv_heads=fields.get("n_kv_heads") or heads,
        head_dim=fields.get("head_dim") or _share("params.json: dim", fields["dim"], heads),
        norm_eps=float(fields.get("norm_eps", 1e-5)),
        rope_theta=float(fields.get("rope_theta") or 10000.0),
        rope_scaling=scaling,
        max_positions=int(fields.get("max_seq_len") or _meta_positions(fields)),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )


def _meta_positions(fields: Mapping[str, Any]) -> int:
    """The positions of the published model that has such a params.json, which does not say them.

    LLaMA 3.1 scales its rope, 3 and Code Llama have a theta of their own, and of the others LLaMA 2 has an epsilon of 1e-5,
    in LLaMA 1 only the 65B.
    """
    theta, layers = fields.get("rope_theta") or 10000.0, fields["n_layers"]
    if fields.get("use_scaled_rope"):
        return 131072
    if theta != 10000.0:
        return 8192 if theta == 500000.0 else 16384
    grouped = fields.get("n_kv_heads") not in (None, fields["n_heads"])
    return 4096 if fields.get("norm_eps", 1e-5) == 1e-5 and (layers != 80 or grouped) else 2048


def config_to_meta(config: LlamaConfig, norm_eps: float | None = None) -> dict[str, Any]:
    """The fields of a params.json, in Meta's order; those beyond LLaMA 1's only where the model needs them.

    norm_eps: instead of the config's. ValueError for a model that params.json can't describe.
    """
    if config.head_dim * config.num_heads != config.hidden_size:
        raise ValueError(
            f"head_dim {config.head_dim} is not hidden size / heads, which Meta's format presumes; choose another format"
        )
    multiple_of, multiplier = _meta_width_rule(config)
    plain = config.rope_theta == 10000.0 and config.rope_scaling is None
    fields: dict[str, Any] = {
        "dim": config.hidden_size,
        "multiple_of": multiple_of,
        "n_heads": config.num_heads,
        "n_layers": config.num_layers,
        "norm_eps": config.norm_eps if norm_eps is None else norm_eps,
        "vocab_size": -1 if plain else config.vocab_size,  # LLaMA 3's loader does not ask the tokenizer
    }
    if multiplier is not None:
        fields["ffn_dim_multiplier"] = multiplier
    if config.num_kv_heads != config.num_heads:
        fields["n_kv_heads"] = config.num_kv_heads
    if config.rope_theta != 10000.0:
        fields["rope_theta"] = config.rope_theta
    if config.rope_scaling is not None and rope_type(config.rope_scaling) != "default":
        scaling = config.rope_scaling
        if rope_type(scaling) != "llama3" or any(scaling[key] != value for key, value in _META_ROPE.items()):
            raise ValueError(f"Meta's params.json has no words for its rope scaling {dict(scaling)}; choose another format")
        fields["use_scaled_rope"] = True
        # Newer loaders read these, older ones pass over them.
        fields["rope_scaling_factor"] = scaling["factor"]
        fields["rope_high_freq_factor"] = scaling["high_freq_factor"]
    if config.tie_embeddings:
        fields["tie_word_embeddings"] = True
    if config.max_positions != _meta_positions(fields):
        fields["max_seq_len"] = config.max_positions
    return fields


def _meta_width_rule(config: LlamaConfig) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) from which Meta's loaders compute the feed-forward width; the roundest there are."""
    start, width = 8 * config.hidden_size // 3, config.intermediate_size
    for digits in range(8):
        multiplier = round(width / start, digits) if digits else 1.0
        for multiple_of in (256, 1024, 4096, 512, 2048, 128, 64, 32, 16, 8, 4, 2, 1):
            if -(-int(multiplier * start) // multiple_of) * multiple_of == width:
                return multiple_of, multiplier if digits else None
    return 1, (width + 0.5) / start
