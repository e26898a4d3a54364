"""The two config files: every published LLaMA's is understood, what is said of positions is computed as transformers does."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from pyalpaca.model import LlamaConfig, config_from_hf, config_from_meta, config_to_hf
from pyalpaca.model.config import config_to_meta
from pyalpaca.model.rope import frequencies

SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_31 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": SCALED,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
# params.json as Meta published it, the feed-forward width and the vocabulary of its tensors, and what config.json of the same
# model says of kv heads, theta, scaling factor and positions.
META = {
    "1-7B": ({"dim": 4096, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06}, 11008, 32000, 32, 1e4, None, 2048),
    "1-65B": ({"dim": 8192, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-05}, 22016, 32000, 64, 1e4, None, 2048),
    "2-7B": ({"dim": 4096, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05}, 11008, 32000, 32, 1e4, None, 4096),
    "2-70B": (
        {"dim": 8192, "n_heads": 64, "n_layers": 80, "n_kv_heads": 8, "norm_eps": 1e-05, "ffn_dim_multiplier": 1.3},
        *(28672, 32000, 8, 1e4, None, 4096),
    ),
    "code-7B": (
        {"dim": 4096, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "ffn_dim_multiplier": 1.0, "rope_theta": 1000000},
        *(11008, 32016, 32, 1e6, None, 16384),
    ),
    "3-8B": (
        {"dim": 4096, "n_heads": 32, "n_layers": 32, "n_kv_heads": 8, "norm_eps": 1e-05, "rope_theta": 500000.0},
        *(14336, 128256, 8, 5e5, None, 8192),
    ),
    "3.1-405B": (
        {"dim": 16384, "n_heads": 128, "n_layers": 126, "n_kv_heads": 8, "norm_eps": 1e-05, "rope_theta": 500000.0}
        | {"vocab_size": 128256, "use_scaled_rope": True},
        *(53248, 128256, 8, 5e5, 8.0, 131072),
    ),
    "3.2-1B": (
        {"dim": 2048, "n_heads": 32, "n_layers": 16, "n_kv_heads": 8, "norm_eps": 1e-05, "rope_theta": 500000.0}
        | {"vocab_size": 128256, "use_scaled_rope": True},
        *(8192, 128256, 8, 5e5, 32.0, 131072),
    ),
}


def published(name: str) -> LlamaConfig:
    fields, width, vocab_size, *_ = META[name]
    return config_from_meta({"vocab_size": -1, "multiple_of": 256, **fields}, vocab_size, width)


def width_of_meta(fields: dict) -> int:
    """The feed-forward width that Meta's loaders compute from a params.json."""
    hidden = int(2 * (4 * fields["dim"]) / 3)
    if fields.get("ffn_dim_multiplier") is not None:
        hidden = int(fields["ffn_dim_multiplier"] * hidden)
    return fields["multiple_of"] * ((hidden + fields["multiple_of"] - 1) // fields["multiple_of"])


@pytest.mark.parametrize("name", META)
def test_a_published_params_json_says_what_the_config_json_of_the_same_model_says(name: str) -> None:
    *_, kv_heads, theta, factor, positions = META[name]
    config = published(name)
    assert (config.num_kv_heads, config.rope_theta, config.max_positions) == (kv_heads, theta, positions)
    assert config.rope_scaling == (None if factor is None else {**SCALED, "factor": factor})


@pytest.mark.parametrize("name", META)
def test_what_is_written_is_read_back_and_gives_metas_loaders_the_width(name: str) -> None:
    config = published(name)
    fields = json.loads(json.dumps(config_to_meta(config)))
    assert config_from_meta(fields, config.vocab_size, config.intermediate_size) == config
    assert width_of_meta(fields) == config.intermediate_size
    assert "max_seq_len" not in fields  # Meta's loaders pass one of their own


def test_llama_31_goes_from_config_json_to_params_json_and_back_without_loss() -> None:
    config = config_from_hf(LLAMA_31)
    fields = config_to_meta(config)
    assert fields == {
        "dim": 4096,
        "multiple_of": 256,
        "n_heads": 32,
        "n_layers": 32,
        "norm_eps": 1e-05,
        "vocab_size": 128256,
        "ffn_dim_multiplier": 1.3,
        "n_kv_heads": 8,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
        "rope_scaling_factor": 8.0,
        "rope_high_freq_factor": 4.0,
    }
    assert config_from_meta(fields, 128256, 14336) == config


@pytest.mark.parametrize("width", [96, 97, 255, 4095, 5461, 7168, 8960])
def test_metas_rule_for_the_width_is_found_for_any(tiny: LlamaConfig, width: int) -> None:
    for hidden in (64, 640, 2048, 6656):
        config = replace(tiny, hidden_size=hidden, head_dim=hidden // 4, intermediate_size=width)
        assert width_of_meta(config_to_meta(config)) == width


@pytest.mark.parametrize("change", [{"max_positions": 999}, {"tie_embeddings": True}, {"rope_theta": 7e4}])
def test_what_no_published_model_has_is_written_out(tiny: LlamaConfig, change: dict) -> None:
    config = replace(tiny, **change)
    assert config_from_meta(config_to_meta(config), config.vocab_size, config.intermediate_size) == config


def test_the_scaling_that_a_params_json_gives_wins() -> None:
    given = {"rope_scaling_factor": 16.0, "rope_high_freq_factor": 2.0, "max_seq_len": 10000}
    config = config_from_meta({**config_to_meta(published("3.1-405B")), **given}, 128256, 53248)
    assert config.rope_scaling == {**SCALED, "factor": 16.0, "high_freq_factor": 2.0}
    assert config.max_positions == 10000


def test_fields_that_are_wrapped_and_a_head_of_its_own_width_are_read() -> None:
    fields = {"dim": 512, "n_heads": 4, "n_layers": 2, "head_dim": 64, "norm_eps": 1e-5}
    assert config_from_meta({"model": fields}, 100, 1408).head_dim == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 32}, "head_dim 32 is not hidden size / heads"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "no words for its rope scaling .*linear"),
        ({"rope_scaling": {**SCALED, "original_max_position_embeddings": 4096}}, "no words for its rope scaling .*4096"),
        ({"rope_scaling": {**SCALED, "low_freq_factor": 2.0}}, "no words for its rope scaling"),
    ],
)
def test_what_a_params_json_cannot_say_is_refused(tiny: LlamaConfig, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_to_meta(replace(tiny, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 32000}, "vocab_size is 32000, but output.weight has 49953 rows; set vocab_size to 49953"),
        ({"n_heads": 24}, "params.json: dim 4096 can't be divided by 24 heads"),
        ({"n_heads": 0}, "num_heads is 0"),
        ({"n_layers": None}, "num_layers is None"),
        ({"moe_args": {"num_experts": 16}}, "moe_args is .*others are not supported"),
        ({"use_scaled_rope": True, "rope_scaling_factor": -1}, "factor of the llama3 rope scaling is -1"),
    ],
)
def test_a_params_json_that_cannot_be_right_is_refused(change: dict, message: str) -> None:
    fields = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1}
    with pytest.raises(ValueError, match=message):
        config_from_meta({**fields, **change}, 49953, 11008)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4}, "rope_theta": 7e4},
        {"rope_scaling": {**SCALED, "type": "llama3"}},
        {"rope_scaling": {k: v for k, v in SCALED.items() if k != "original_max_position_embeddings"}},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
        {"rope_scaling": None, "rope_parameters": {**SCALED, "factor": 32.0, "rope_theta": 3e4}},
        {"rope_scaling": None, "head_dim": 64},
    ],
)
def test_the_angles_are_those_of_transformers(rope: dict) -> None:
    from transformers import LlamaConfig as HFConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = {**LLAMA_31, **rope}
    expected = LlamaRotaryEmbedding(HFConfig(**json.loads(json.dumps(fields)))).inv_freq
    config = config_from_hf(fields)
    torch.testing.assert_close(frequencies(config), expected, rtol=1e-6, atol=0)
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not one of default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope scaling 'longrope' is not one of"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor of the linear rope scaling is None, expected a positive number"),
        ({"rope_scaling": {**SCALED, "factor": "8"}}, "factor of the llama3 rope scaling is '8'"),
        ({"rope_scaling": {**SCALED, "high_freq_factor": 1.0}}, "high_freq_factor 1.0 .* is not above low_freq_factor 1.0"),
        ({"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between kinds of layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"model_type": "smollm3"}, "model_type is 'smollm3'; expected llama"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config says that the weights are quantized"),
        ({"num_attention_heads": 24}, "hidden_size 4096 can't be divided by 24 heads, and no head_dim is given"),
    ],
)
def test_a_config_json_of_what_is_no_llama_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_hf({**LLAMA_31, **change})
