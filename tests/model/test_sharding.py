"""The sharding table: complete, exact, and honest about what it can't cut."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from twin import transformers_twin

from pyalpaca.model import (
    LlamaConfig,
    config_from_hf,
    config_from_meta,
    config_to_hf,
    cut,
    flatten,
    init,
    lora_parameters,
    natural_key,
    parameters,
    shard,
    stage_layers,
    stage_parameters,
)

LLAMA_7B = LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128)
LLAMA_13B = LlamaConfig(49954, 5120, 13824, 40, 40, 40, 128)
ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_names_and_order_are_those_of_transformers(tiny: LlamaConfig, tiny_params) -> None:
    twin = transformers_twin(tiny, tiny_params)
    assert [p.name for p in parameters(tiny)] == list(twin.state_dict())
    assert [p.shape for p in parameters(tiny)] == [tuple(t.shape) for t in twin.state_dict().values()]


def test_the_published_parameter_counts() -> None:
    assert sum(math.prod(p.shape) for p in parameters(LLAMA_7B)) == 6_738_415_616
    lora = sum(math.prod(p.shape) for p in lora_parameters(parameters(LLAMA_7B), 8, ALL_PROJECTIONS))
    assert lora == 19_988_480
    for vocabulary, trainable in ((49953, 429_203_456), (49954, 429_211_648)):
        assert lora + 2 * vocabulary * 4096 == trainable


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 2), (8, 1), (8, 4)])
def test_the_shards_of_every_layout_add_up_to_the_model(tp: int, pp: int) -> None:
    total = 0
    for stage in range(pp):
        for p in stage_parameters(parameters(LLAMA_13B), 40, stage, pp):
            for rank in range(tp):
                piece = shard(p, rank, tp)
                if piece is None:
                    total += math.prod(p.shape) * (rank == 0)
                else:
                    total += math.prod(p.shape) // p.shape[piece[0]] * (piece[2] - piece[1])
    assert total == sum(math.prod(p.shape) for p in parameters(LLAMA_13B))


def test_an_uneven_vocabulary_leaves_the_remainder_to_the_last_rank() -> None:
    assert [cut(49953, r, 2, uneven=True) for r in range(2)] == [(0, 24976), (24976, 49953)]
    widths = [b - a for a, b in (cut(49954, r, 4, uneven=True) for r in range(4))]
    assert widths == [12488, 12488, 12488, 12490]


def test_heads_that_tp_does_not_divide_are_named() -> None:
    config = LlamaConfig(32000, 6656, 17920, 60, 52, 52, 128)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj.weight: 52 heads can't be cut in 8 equal parts"):
        [shard(p, 0, 8) for p in parameters(config)]


def test_stages_take_contiguous_layers_as_evenly_as_possible() -> None:
    assert [list(stage_layers(5, s, 2)) for s in range(2)] == [[0, 1], [2, 3, 4]]
    with pytest.raises(ValueError, match="at most 2"):
        stage_layers(2, 0, 3)


def test_an_unknown_lora_target_is_an_error(tiny: LlamaConfig) -> None:
    with pytest.raises(ValueError, match="query_key_value matches no projection"):
        lora_parameters(parameters(tiny), 8, ["q_proj", "query_key_value"])


def test_initial_values_do_not_depend_on_the_layout(tiny: LlamaConfig) -> None:
    whole = flatten(init(parameters(tiny), seed=5))
    for rank in range(2):
        for path, part in flatten(init(parameters(tiny), seed=5, rank=rank, ranks=2)).items():
            p = next(p for p in parameters(tiny) if p.path == path)
            piece = shard(p, rank, 2)
            expected = whole[path] if piece is None else whole[path].narrow(piece[0], piece[1], piece[2] - piece[1])
            assert torch.equal(part, expected)


def test_natural_order_counts_layers() -> None:
    assert sorted(["l.10.w", "l.2.w", "l.1.w"], key=natural_key) == ["l.1.w", "l.2.w", "l.10.w"]


def test_config_survives_the_way_through_both_generations_of_config_json(tiny: LlamaConfig) -> None:
    config = replace(tiny, rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 2.0})
    old = config_to_hf(config)
    assert config_from_hf(old) == config
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    assert config_from_hf({**new, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}) == config


def test_config_of_meta_takes_vocabulary_and_width_from_the_tensors() -> None:
    fields = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1}
    assert config_from_meta(fields, 32000, 11008) == LLAMA_7B


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": None}, "num_attention_heads missing"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_key_value_heads": 3}, "4 heads can't share 3"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not one of"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(tiny: LlamaConfig, change: dict, message: str) -> None:
    fields = {k: v for k, v in {**config_to_hf(tiny), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        config_from_hf(fields)
