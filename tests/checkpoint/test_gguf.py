"""A LLaMA in a GGUF file, held to the official package, to transformers, and to the checkpoint it was made from."""

from __future__ import annotations

import dataclasses
import warnings

import gguf
import numpy as np
import pytest
import torch
from checkpoint_makers import CONFIG, make_hf, model, tensors
from gguf_makers import blocks, official

from pyalpaca.checkpoint import digest, memory_reader, open_checkpoint, write_hf
from pyalpaca.checkpoint.container.gguf_file import gguf_layout, open_gguf_file
from pyalpaca.checkpoint.gguf_config import ROPE_FACTORS, llama3_factors
from pyalpaca.checkpoint.gguf_model import find_gguf, gguf_name, open_gguf, plan_gguf, write_gguf
from pyalpaca.checkpoint.plan import write_file
from pyalpaca.model import LlamaConfig

GROUPED = dataclasses.replace(CONFIG, num_heads=4, num_kv_heads=2, head_dim=16, norm_eps=1e-5)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {
    "grouped": GROUPED,
    "tied": dataclasses.replace(GROUPED, tie_embeddings=True, max_positions=4096),
    "wide heads": dataclasses.replace(GROUPED, head_dim=32),
    "llama3": dataclasses.replace(GROUPED, rope_theta=500000.0, rope_scaling=LLAMA3, max_positions=131072),
    "linear": dataclasses.replace(GROUPED, rope_scaling={"rope_type": "linear", "factor": 2.5}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_model_comes_back_the_same_in_every_lossless_type(shape, dtype, tmp_path):
    reader = model(SHAPES[shape], dtype)
    write_gguf(reader, tmp_path / "a.gguf")
    back = open_gguf(tmp_path / "a.gguf")
    assert back.config == reader.config
    assert (back.names, back.dtypes, back.shapes) == (reader.names, reader.dtypes, reader.shapes)
    assert digest(back) == digest(reader)
    write_hf(back, tmp_path / "hf")
    again = open_checkpoint(tmp_path / "hf")
    assert (again.config, digest(again)) == (reader.config, digest(reader))


def test_a_model_has_the_names_types_and_values_that_llama_cpp_expects(tmp_path):
    reader = model(SHAPES["llama3"])
    write_gguf(reader, tmp_path / "a.gguf")
    file = gguf.GGUFReader(tmp_path / "a.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, reader.config.num_layers)
    expected = {names.get_name(name, (".weight",)): name for name in reader.names}
    assert [t.name for t in file.tensors] == [ROPE_FACTORS, *expected]
    for tensor in file.tensors[1:]:
        value = reader.read(expected[tensor.name])
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            d = reader.config.head_dim  # Hugging Face's half-split rotary order to neighbouring pairs
            rows = [h * d + i // 2 + i % 2 * d // 2 for h in range(len(value) // d) for i in range(d)]
            value = value[rows]
        assert tensor.tensor_type.name == ("F32" if value.ndim == 1 else "F16")
        assert np.array_equal(tensor.data.reshape(value.shape), value.numpy())
    fields = {key: field.contents() for key, field in file.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert fields["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert fields["llama.context_length"] == 131072
    assert fields["llama.rope.freq_base"] == 500000.0
    assert fields["llama.rope.dimension_count"] == fields["llama.attention.key_length"] == 16
    assert fields["tokenizer.ggml.model"] == "none"


def test_a_model_gives_the_logits_of_the_folder_it_was_made_from_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    make_hf(tmp_path / "hf", model(GROUPED, torch.float32))
    write_gguf(open_checkpoint(tmp_path / "hf"), tmp_path / "a.gguf")
    ids = torch.arange(1, 90).view(1, -1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)(ids).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [None, "q8_0"])
def test_a_model_is_read_in_pieces_that_may_cut_heads_and_blocks(dtype, tmp_path):
    reader = model(GROUPED, torch.float32)
    write_gguf(reader, tmp_path / "a.gguf", dtype=dtype)
    back = open_gguf(tmp_path / "a.gguf")
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
        key = f"model.layers.1.{name}.weight"
        whole = back.read(key)
        assert (whole - reader.read(key)).abs().max() < (0.01 if dtype else 1e-30)
        for dim in (0, 1):
            for start, stop in ((0, 16), (5, 23), (31, 32)):
                assert torch.equal(back.read(key, (dim, start, stop)), whole.narrow(dim, start, stop - start))


def test_norms_that_would_lose_something_stay_float32(tmp_path):
    values = tensors(GROUPED)
    values = {name: value.float() + 1e-4 if value.ndim == 1 else value for name, value in values.items()}
    reader = memory_reader(GROUPED, values)
    write_gguf(reader, tmp_path / "a.gguf")
    back = open_gguf(tmp_path / "a.gguf")
    assert back.dtypes["model.norm.weight"] == torch.float32
    assert digest(back) == digest(reader)


@pytest.mark.parametrize(("dtype", "kind", "number"), [("f32", "F32", 0), ("f16", "F16", 1), ("bf16", "BF16", 32)])
def test_a_model_is_cast_to_what_is_asked_for(dtype, kind, number, tmp_path):
    reader = model(GROUPED, torch.bfloat16)
    write_gguf(reader, tmp_path / "a.gguf", dtype=dtype)
    file = open_gguf_file(tmp_path / "a.gguf")
    assert file.metadata["general.file_type"] == number
    assert {file.types[gguf_name(n)] for n in reader.names if len(reader.shapes[n]) == 2} == {kind}
    back = open_gguf(tmp_path / "a.gguf")
    assert all(torch.equal(back.read(n), reader.read(n).to(back.dtypes[n])) for n in reader.names)


@pytest.mark.parametrize(("dtype", "number"), [("q8_0", 7), ("q4_0", 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_quantized_but_for_norms_and_the_head(dtype, number, tied, tmp_path):
    reader = model(SHAPES["tied" if tied else "grouped"])
    write_gguf(reader, tmp_path / "a.gguf", dtype=dtype)
    file = open_gguf_file(tmp_path / "a.gguf")
    head = "token_embd.weight" if tied else "output.weight"
    assert file.metadata["general.file_type"] == number
    for name in reader.names:
        key, whole = gguf_name(name), reader.read(name).float()
        if whole.ndim == 1:
            assert file.types[key] == "F32"
            continue
        assert file.types[key] == ("Q8_0" if key == head else dtype.upper())
        quantized = gguf.quants.quantize(whole.numpy(), gguf.GGMLQuantizationType[file.types[key]])
        expected = gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType[file.types[key]])
        assert np.array_equal(open_gguf(tmp_path / "a.gguf").read(name).numpy(), expected)


def test_rows_that_are_no_whole_blocks_are_float16(tmp_path):
    config = dataclasses.replace(GROUPED, intermediate_size=40)
    write_gguf(model(config), tmp_path / "a.gguf", dtype="q8_0")
    types = open_gguf_file(tmp_path / "a.gguf").types
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"


def test_a_model_quantized_by_llama_cpp_in_several_types_is_read(tmp_path):
    config = dataclasses.replace(GROUPED, hidden_size=256, intermediate_size=256, head_dim=64, num_layers=1)
    write_gguf(model(config), tmp_path / "plain.gguf", dtype="f32")
    plain = open_gguf_file(tmp_path / "plain.gguf")
    kinds = {
        name: "F32" if kind == "F32" and len(plain.tensors.shapes[name]) == 1 else "Q4_K" for name, kind in plain.types.items()
    }
    kinds |= {"output.weight": "Q6_K", "blk.0.attn_v.weight": "Q6_K", "token_embd.weight": "Q5_0"}
    arrays = {
        name: plain.tensors.read(name, None).numpy() if kind == "F32" else blocks(kind, plain.tensors.shapes[name], seed)
        for seed, (name, kind) in enumerate(kinds.items())
    }
    reader = open_gguf(official(tmp_path / "a.gguf", plain.metadata, arrays, kinds))
    assert set(reader.dtypes.values()) == {torch.float32}
    for name in ("model.layers.0.self_attn.v_proj.weight", "lm_head.weight", "model.embed_tokens.weight"):
        key = gguf_name(name)
        expected = gguf.quants.dequantize(arrays[key], gguf.GGMLQuantizationType[kinds[key]])
        assert np.array_equal(reader.read(name).numpy(), expected)


@pytest.mark.parametrize("scaling", [LLAMA3, {**LLAMA3, "factor": 32.0}, {**LLAMA3, "original_max_position_embeddings": 64}])
def test_llama3_rope_scaling_is_found_again_from_its_factors(scaling, tmp_path):
    config = dataclasses.replace(GROUPED, rope_theta=500000.0, head_dim=64, rope_scaling=scaling)
    write_gguf(model(config), tmp_path / "a.gguf")
    assert open_gguf(tmp_path / "a.gguf").config == config


def test_rope_factors_divide_the_frequencies_as_the_model_does():
    from transformers import LlamaConfig as TheirConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = TheirConfig(hidden_size=512, num_attention_heads=4, rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2).float() / 128)
    assert torch.allclose(plain / llama3_factors(LLAMA3, 128, 500000.0), scaled, rtol=1e-6)


def test_a_model_that_can_not_be_written_is_refused_before_anything_is(tmp_path):
    with pytest.raises(ValueError, match="dtype 'q4_k' is not one of f32, f16, bf16, q8_0, q4_0"):
        plan_gguf(model(GROUPED), dtype="q4_k")
    with pytest.raises(ValueError, match=r"is float64, which llama\.cpp doesn't compute in; choose a dtype of"):
        plan_gguf(model(GROUPED, torch.float64))


def changed(tmp_path, change, config: LlamaConfig = GROUPED):
    """A written model whose metadata and tensors the function `change` edits in place, written anew."""
    write_gguf(model(config, torch.float32), tmp_path / "good.gguf")
    file = open_gguf_file(tmp_path / "good.gguf")
    values, arrays = dict(file.metadata), {name: file.tensors.read(name, None) for name in file.types}
    change(values, arrays)
    table = {name: (tuple(array.shape), "I32" if array.dtype == torch.int32 else "F32") for name, array in arrays.items()}
    write_file(gguf_layout("bad.gguf", values, table), tmp_path / "bad.gguf", arrays)
    return tmp_path / "bad.gguf"


def put(key, value):
    return lambda values, arrays: values.__setitem__(key, value)


def add(name, shape=(64,)):
    return lambda values, arrays: arrays.__setitem__(name, torch.ones(shape))


FOREIGN = {
    "architecture": (put("general.architecture", "qwen2"), "its architecture is 'qwen2', not 'llama'; expected the shape of"),
    "no architecture": (lambda v, a: v.pop("general.architecture"), "its architecture is None"),
    "experts": (put("llama.expert_count", np.uint32(8)), "is a mixture of 8 experts"),
    "router": (
        add("blk.0.ffn_gate_inp.weight"),
        "blk.0.ffn_gate_inp.weight is in no LLaMA model of 3 layers; models with biases",
    ),
    "bias": (add("blk.1.attn_q.bias"), "blk.1.attn_q.bias is in no LLaMA model"),
    "fused": (add("blk.0.attn_qkv.weight"), "blk.0.attn_qkv.weight is in no LLaMA model"),
    "missing": (lambda v, a: a.pop("blk.2.ffn_up.weight"), "model.layers.2.mlp.up_proj.weight missing"),
    "no embedding": (lambda v, a: a.pop("token_embd.weight"), "no matrix token_embd.weight"),
    "shape": (add("blk.2.ffn_up.weight", (3, 64)), "model.layers.2.mlp.up_proj.weight is 3 x 64, expected 96 x 64"),
    "no layers": (lambda v, a: v.pop("llama.block_count"), "llama.block_count missing"),
    "text": (put("llama.block_count", "3"), "llama.block_count is '3', expected a number"),
    "layers": (put("llama.block_count", np.uint32(1 << 31)), "asks for 2147483648 layers, but the weights are 30 tensors"),
    "differing": (put("llama.feed_forward_length", np.array([96, 96, 32], np.uint32)), "differs between layers"),
    "partial rotary": (put("llama.rope.dimension_count", np.uint32(8)), "rope.dimension_count is 8, but the heads have 16"),
    "no heads": (put("llama.attention.head_count", np.uint32(0)), "num_heads is 0"),
    "yarn": (
        lambda v, a: v.update({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": np.float32(4)}),
        "rope scaling 'yarn' is not one of",
    ),
    "factors": (
        lambda v, a: a.__setitem__(ROPE_FACTORS, torch.tensor([1.0, 2, 1, 3, 1, 5, 1, 2])),
        "holds other factors than LLaMA 3's scaling gives",
    ),
    "few factors": (add(ROPE_FACTORS, (3,)), "does not fit the other metadata"),
    "integers": (
        lambda v, a: a.__setitem__("blk.0.attn_v.weight", torch.ones(32, 64, dtype=torch.int32)),
        "blk.0.attn_v.weight is I32, expected floating-point numbers",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_model_is_refused_by_name(name, tmp_path):
    change, message = FOREIGN[name]
    path = changed(tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        open_gguf(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_foreign_model_may_spell_things_as_older_converters_did(tmp_path):
    def older(values, arrays):
        for key in ("attention.key_length", "attention.value_length", "vocab_size", "attention.head_count_kv"):
            del values[f"llama.{key}"]
        values["llama.feed_forward_length"] = np.array([96] * 3, np.int32)
        values["llama.rope.scale_linear"] = np.float32(4)
        arrays[ROPE_FACTORS] = torch.ones(4)
        del values["llama.rope.scale_linear"]

    path = changed(tmp_path, older, CONFIG)
    assert open_gguf(path).config == CONFIG


def test_a_foreign_model_is_found_in_a_folder_if_it_is_the_only_one(tmp_path):
    assert find_gguf(tmp_path) is None
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "mmproj-m.gguf", "README.md"):
        (tmp_path / name).touch()
    assert find_gguf(tmp_path) == find_gguf(tmp_path / "m-00001-of-00002.gguf") == tmp_path / "m-00001-of-00002.gguf"
    assert find_gguf(tmp_path / "README.md") is None
    (tmp_path / "n.gguf").touch()
    with pytest.raises(ValueError, match=r"holds several models, m-00001-of-00002\.gguf and n\.gguf; give the one to open"):
        find_gguf(tmp_path)
