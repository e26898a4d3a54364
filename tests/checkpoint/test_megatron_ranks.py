"""Megatron's layout: published shapes, the fused rows, padding, both spellings, DeepSpeed, and files of different runs."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_makers import CONFIG, make_hf, make_tokenizer, model, snapshot, tensors

from pyalpaca.checkpoint import SIZES, convert, digest, memory_reader, open_checkpoint, padded_vocab, write_megatron
from pyalpaca.checkpoint.megatron_writer import plan_megatron
from pyalpaca.commands import convert_weights_from_huggingface
from pyalpaca.model import LlamaConfig, parameters


def state(folder: Path, name: str = "release/mp_rank_00/model_optim_rng.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def published(name: str, tp: int, pp: int, stage: int) -> dict[str, tuple[int, ...]]:
    """{key: shape} of one rank's file of a published size at 49954."""
    size = SIZES[name]
    config = LlamaConfig(49954, size.hidden_size, size.intermediate_size, size.num_layers, size.num_heads, size.num_heads, 128)
    reader = memory_reader(config, {p.name: torch.empty(p.shape, device="meta") for p in parameters(config)})
    specs = plan_megatron(reader, tp=tp, pp=pp).files[stage * tp].specs
    return {key.removeprefix("model/"): shape for key, (shape, _) in specs.items() if not key.endswith("inv_freq")}


def test_13b_at_tp4_pp2_has_the_published_shapes():
    stages = [published("13B", 4, 2, stage) for stage in (0, 1)]
    assert [sum(map(math.prod, s.values())) for s in stages] == [1_650_401_280, 1_650_406_400]
    shapes = {key.removeprefix("language_model.layers.19."): shape for key, shape in (stages[0] | stages[1]).items()}
    assert shapes["attention.query_key_value.weight"] == (3840, 5120)
    assert shapes["attention.dense.weight"] == (5120, 1280)
    assert shapes["mlp.gate_proj.weight"] == shapes["mlp.up_proj.weight"] == (3456, 5120)
    assert shapes["mlp.down_proj.weight"] == (5120, 3456)
    assert shapes["embedding.word_embeddings.weight"] == shapes["lm_head.lm_head.weight"] == (12544, 5120)
    assert all("language_model.layers.20.input_layernorm.weight" not in s for s in stages)


def test_33b_at_tp4_has_the_published_shapes():
    shapes = published("33B", 4, 1, 0)
    layer = "language_model.layers.59."
    assert shapes[f"{layer}attention.query_key_value.weight"] == (4992, 6656)
    assert shapes[f"{layer}attention.dense.weight"] == (6656, 1664)
    assert shapes[f"{layer}mlp.gate_proj.weight"] == (4480, 6656)
    assert shapes["embedding.word_embeddings.weight"] == (12544, 6656)


@pytest.mark.parametrize(
    ("vocab", "tp", "rows"), [(49954, 1, 50048), (49954, 2, 50176), (49954, 8, 50176), (32000, 4, 32256), (32000, 8, 32768)]
)
def test_the_vocabulary_is_padded_to_128_times_tp(vocab, tp, rows):
    assert padded_vocab(vocab, 128, tp) == rows


GQA = replace(CONFIG, num_kv_heads=4)


@pytest.mark.parametrize("config", [CONFIG, GQA, replace(CONFIG, tie_embeddings=True)], ids=["mha", "gqa", "tied"])
@pytest.mark.parametrize("dialect", ["A", "B"])
@pytest.mark.parametrize(("tp", "pp", "merge"), [(1, 1, False), (2, 2, True), (4, 3, False), (4, 1, True)])
def test_every_cut_holds_the_same_model(tmp_path, config, dialect, tp, pp, merge):
    write_megatron(model(config), tmp_path, tp=tp, pp=pp, dialect=dialect, merge_mlp=merge)
    reader = open_checkpoint(tmp_path)
    assert reader.config == config
    assert digest(reader) == digest(model(config))
    for name, tensor in tensors(config).items():
        for dim in range(tensor.dim()):
            start, stop = tensor.shape[dim] // 3, tensor.shape[dim] // 2 + 3
            assert torch.equal(reader.read(name, (dim, start, stop)), tensor.narrow(dim, start, stop - start)), name


def test_a_rank_holds_q_k_v_of_each_head_in_turn(tmp_path):
    write_megatron(model(), tmp_path, tp=2)
    fused = state(tmp_path, "release/mp_rank_01/model_optim_rng.pt")["model"][
        "language_model.layers.1.attention.query_key_value.weight"
    ]
    whole, d = tensors(), CONFIG.head_dim
    for local in range(4):
        for i, x in enumerate("qkv"):
            head = 4 + local
            rows = whole[f"model.layers.1.self_attn.{x}_proj.weight"][head * d : (head + 1) * d]
            assert torch.equal(fused[(local * 3 + i) * d : (local * 3 + i + 1) * d], rows)


def test_grouped_queries_lie_before_their_key_and_value(tmp_path):
    write_megatron(model(GQA), tmp_path, tp=2)
    fused = state(tmp_path)["model"]["language_model.layers.0.attention.query_key_value.weight"].view(2, 4, 8, 64)
    whole = tensors(GQA)
    assert torch.equal(fused[1, :2].reshape(16, 64), whole["model.layers.0.self_attn.q_proj.weight"][16:32])
    assert torch.equal(fused[1, 2], whole["model.layers.0.self_attn.k_proj.weight"][8:16])
    assert torch.equal(fused[1, 3], whole["model.layers.0.self_attn.v_proj.weight"][8:16])


def test_padding_copies_the_last_real_rows(tmp_path):
    write_megatron(model(), tmp_path, tp=1, divisible_by=64)
    padded = state(tmp_path)["model"]["embedding.word_embeddings.weight"]
    real = tensors()["model.embed_tokens.weight"]
    assert torch.equal(padded, torch.cat([real, real[-(128 - 97) :]]))


def test_spelling_a_is_flat_and_spelling_b_nested(tmp_path):
    write_megatron(model(), tmp_path / "a", tp=2, pp=3, dialect="A")
    assert (tmp_path / "a" / "latest_checkpointed_iteration.txt").read_bytes() == b"release\n"
    first, last = (state(tmp_path / "a", f"release/mp_rank_01_{stage:03d}/model_optim_rng.pt") for stage in (0, 2))
    assert first["checkpoint_version"] == 3.0
    layer = [
        "attention.rotary_emb.inv_freq",
        "attention.query_key_value.weight",
        "attention.dense.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    ]
    assert set(first["model"]) == {"embedding.word_embeddings.weight", *(f"language_model.layers.0.{key}" for key in layer)}
    assert set(last["model"]) - set(first["model"]) == {"language_model.final_layernorm.weight", "lm_head.lm_head.weight"}
    write_megatron(model(), tmp_path / "plain", dialect="B")
    encoder = state(tmp_path / "plain")["model"]["language_model"]["encoder"]
    assert torch.equal(encoder["layers.1.mlp.dense_h_to_4h.weight"], tensors()["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(encoder["layers.1.mlp.gate_proj.weight"], tensors()["model.layers.1.mlp.gate_proj.weight"])
    assert torch.equal(
        first["model"]["language_model.layers.0.mlp.up_proj.weight"], tensors()["model.layers.0.mlp.up_proj.weight"][48:]
    )
    write_megatron(model(), tmp_path / "b", dialect="B", merge_mlp=True)
    nested = state(tmp_path / "b")["model"]["language_model"]
    assert set(nested) == {"embedding", "encoder", "output_layer"}
    assert set(nested["embedding"]["word_embeddings"]) == set(nested["output_layer"]) == {"weight"}
    whole = tensors()
    gate_up = torch.cat([whole[f"model.layers.2.mlp.{x}_proj.weight"] for x in ("gate", "up")])
    assert torch.equal(nested["encoder"]["layers.2.mlp.proj.weight"], gate_up)
    assert torch.equal(nested["encoder"]["layers.2.mlp.dense_4h_to_h.weight"], whole["model.layers.2.mlp.down_proj.weight"])
    assert "layers.0.self_attention.query_key_value.weight" in nested["encoder"]
    assert "final_layernorm.weight" in nested["encoder"]


def test_the_deepspeed_variant(tmp_path):
    source = make_hf(tmp_path / "hf")
    flags = ["--input-model-dir", str(source), "--output-model-dir", str(tmp_path / "ds"), "--tensor-model-parallel-size", "2"]
    convert_weights_from_huggingface.main([*flags, "--deepspeed", "--dialect", "B"])
    content = state(tmp_path / "ds", "release/mp_rank_01_model_states.pt")
    assert {key: content[key] for key in content if key != "module"} == {"checkpoint_version": 3.0, "dp_world_size": 0}
    assert (tmp_path / "ds" / "latest").read_text().strip() == "release"
    reader = open_checkpoint(tmp_path / "ds")
    assert reader.layout == "deepspeed"
    assert digest(reader) == digest(model())
    with pytest.raises(ValueError, match="no pipeline stages, 2 asked for"):
        convert_weights_from_huggingface.main([*flags, "--deepspeed", "--pipeline-model-parallel-size", "2"])


def test_config_and_tokenizer_lie_beside_the_tracker(tmp_path):
    source = make_hf(tmp_path / "hf", model(tokenizer=make_tokenizer(tmp_path / "t", CONFIG.vocab_size)))
    convert(source, tmp_path / "mg", "megatron", tp=2)
    assert open_checkpoint(tmp_path / "mg").tokenizer == tmp_path / "mg"
    convert(tmp_path / "mg", tmp_path / "back", "hf")
    for name in ("config.json", "tokenizer.model", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_a_training_iteration_is_opened(tmp_path):
    write_megatron(model(), tmp_path, tp=2)
    (tmp_path / "release").rename(tmp_path / "iter_0000123")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("123")
    assert digest(open_checkpoint(tmp_path)) == digest(model())


def test_without_config_the_shape_comes_from_the_tensors(tmp_path):
    write_megatron(model(GQA), tmp_path, tp=2, pp=2)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: not found, so the real vocabulary is unknown"):
        open_checkpoint(tmp_path)
    reader = open_checkpoint(tmp_path, vocab_size=97)
    assert reader.config == GQA
    assert digest(reader) == digest(model(GQA))


def test_without_config_and_frequencies_the_heads_are_unknown(tmp_path):
    write_megatron(model(), tmp_path, dialect="B")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="no published size, so the number of heads is unknown"):
        open_checkpoint(tmp_path, vocab_size=97)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--tensor-model-parallel-size", "3"], "8 heads can't be cut in 3 equal parts"),
        (["--pipeline-model-parallel-size", "4"], "3 layers can't fill 4 pipeline stages"),
        (["--type", "13B"], "num_layers 3, --type 13B asks for 40"),
        (["--type", "7B", "--num_layers", "3", "--hidden_size", "64"], "num_heads 8, --type 7B asks for 32"),
        (["--num_kv_heads", "2"], "num_kv_heads 8, --num_kv_heads asks for 2"),
        (["--type", "8B"], "--type 8B is not one of 7B"),
        (["--make-vocab-size-divisible-by", "0"], "can't be divisible by 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_writing(tmp_path, flags, match):
    source = make_hf(tmp_path / "hf")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=match):
        convert_weights_from_huggingface.main(
            ["--input-model-dir", str(source), "--output-model-dir", str(tmp_path / "o"), *flags]
        )
    assert snapshot(tmp_path) == before


def test_52_heads_cannot_be_cut_by_8():
    with pytest.raises(ValueError, match="52 heads can't be cut in 8 equal parts"):
        published("33B", 8, 1, 0)


@pytest.fixture
def folder(tmp_path):
    write_megatron(model(), tmp_path / "mg", tp=2, pp=2)
    return tmp_path / "mg"


def refused(folder, match):
    before = snapshot(folder.parent)
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        convert(folder, folder.parent / "out", "hf")
    assert snapshot(folder.parent) == before


def test_a_missing_rank_is_named(folder):
    shutil.rmtree(folder / "release" / "mp_rank_00_001")
    refused(folder, "tensor-parallel rank 0, stage 1 is missing; expected 2 x 2 files")


def test_a_truncated_rank_file_is_named(folder):
    path = folder / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:5000])
    refused(folder, "mp_rank_01_001/model_optim_rng.pt: is truncated")


def test_a_tracker_that_points_nowhere_is_named(folder):
    (folder / "latest_checkpointed_iteration.txt").write_text("77\n")
    refused(folder, "iter_0000077: not found, but latest_checkpointed_iteration.txt names it")
    (folder / "latest_checkpointed_iteration.txt").write_text("../../etc\n")
    refused(folder, "expected `release` or an iteration number")


def test_ranks_of_different_runs_are_not_mixed(folder):
    path = folder / "release" / "mp_rank_01_000" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=True)
    content["model"]["language_model.layers.0.input_layernorm.weight"] += 1
    torch.save(content, path)
    refused(folder, "input_layernorm.weight of stage 0 differs between ranks")


def test_a_config_of_another_model_is_refused(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"vocab_size": 97', '"vocab_size": 970'))
    refused(folder, "has 256 rows, fewer than the vocabulary, 970")
    (folder / "config.json").write_text(text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    refused(folder, "the stages hold 3 layers, config.json says 4")
