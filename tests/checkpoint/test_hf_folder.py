"""Hugging Face folders, judged by transformers: it writes and we read, we write and it computes the same logits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from checkpoint_makers import CONFIG, make_hf, model, snapshot, tensors

from pyalpaca.checkpoint import convert, digest, memory_reader, open_checkpoint, write_hf
from pyalpaca.checkpoint.hf import parse_size
from pyalpaca.model import LlamaConfig, config_to_hf

GQA = replace(CONFIG, num_kv_heads=2, rope_theta=500000.0)
TIED = replace(CONFIG, tie_embeddings=True)
LLAMA3 = replace(
    GQA,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
)


def twin(config: LlamaConfig):
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(HFConfig(**config_to_hf(config, "float32"))).eval()


@pytest.mark.parametrize("config", [CONFIG, GQA, TIED, LLAMA3], ids=["llama1", "gqa", "tied", "llama3"])
@pytest.mark.parametrize("shard", ["10MB", "50KB"])
def test_what_transformers_saves_is_read(tmp_path, config, shard):
    network = twin(config)
    network.save_pretrained(tmp_path, max_shard_size=shard)
    reader = open_checkpoint(tmp_path)
    state = network.state_dict()
    assert reader.config == config
    assert reader.names == list(tensors(config))
    for name in reader.names:
        assert torch.equal(reader.read(name), state[name])


@pytest.mark.parametrize("config", [CONFIG, GQA, TIED, LLAMA3], ids=["llama1", "gqa", "tied", "llama3"])
@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("size", ["5GB", "50KB"])
def test_transformers_computes_the_same_logits_from_what_we_write(tmp_path, config, weights, size):
    from transformers import AutoModelForCausalLM

    network = twin(config)
    network.save_pretrained(tmp_path / "theirs")
    write_hf(open_checkpoint(tmp_path / "theirs"), tmp_path / "ours", weights=weights, max_shard_size=size)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert again.dtype == torch.float32
    words = torch.randint(0, config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(words).logits, network(words).logits)


def test_more_than_nine_shards_are_ordered_by_number(tmp_path):
    folder = make_hf(tmp_path / "many", weights="bin", max_shard_size="13KB")
    assert len(list(folder.glob("*.bin"))) > 9
    assert digest(open_checkpoint(folder)) == digest(model())
    (folder / "pytorch_model.bin.index.json").unlink()  # numbered names are enough
    assert digest(open_checkpoint(folder)) == digest(model())


def test_old_buffers_and_legacy_files_are_read(tmp_path):
    folder = make_hf(tmp_path / "old")
    (folder / "model.safetensors").unlink()
    state = {**tensors(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert digest(open_checkpoint(folder)) == digest(model())


def test_a_config_that_says_the_wrong_vocabulary_is_refused_or_corrected(tmp_path):
    folder = make_hf(tmp_path / "stale")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "vocab_size": 32}))
    with pytest.raises(ValueError, match=r"vocab_size is 32, but model\.embed_tokens\.weight has 97 rows"):
        open_checkpoint(folder)
    reader = open_checkpoint(folder, vocab_size=97)
    write_hf(reader, tmp_path / "right")
    assert open_checkpoint(tmp_path / "right").config.vocab_size == 97


def test_a_slice_is_read_without_the_rest(tmp_path):
    reader = open_checkpoint(make_hf(tmp_path / "m"))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(reader.read(name, (1, 24, 48)), tensors()[name][:, 24:48])
    with pytest.raises(IndexError, match="outside of shape"):
        reader.read(name, (1, 24, 97))


def test_casting_changes_types_only(tmp_path):
    convert(make_hf(tmp_path / "m"), tmp_path / "b", "hf", dtype="bfloat16")
    reader = open_checkpoint(tmp_path / "b")
    assert {reader.dtype(name) for name in reader.names} == {torch.bfloat16}
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, tensor in tensors().items():
        assert torch.equal(reader.read(name), tensor.bfloat16())


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("500", 500), ("7kb", 7000)])
def test_sizes_are_understood(text, size):
    assert parse_size(text) == size


def refused(folder, match):
    before = snapshot(folder.parent)
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        convert(folder, folder.parent / "out", "megatron", tp=2)
    assert snapshot(folder.parent) == before


def test_a_missing_shard_is_named(tmp_path):
    folder = make_hf(tmp_path / "m", max_shard_size="50KB")
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    refused(folder, f"{shards[1].name}: not found, but model.safetensors.index.json names it")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, f"{shards[1].name}: not found, {len(shards) - 1} of {len(shards)} shards are there")


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("keep", [0, 5, 40000])
def test_a_truncated_shard_is_named(tmp_path, weights, keep):
    folder = make_hf(tmp_path / "m", weights=weights)
    file = next(folder.glob(f"*.{weights}"))
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, rf"{file.name}: (is empty|is truncated|can't be read)")


@pytest.mark.parametrize("page", ["config.json", "pytorch_model.bin.index.json", "FIRST"])
def test_a_page_instead_of_a_file_is_named(tmp_path, page):
    folder = make_hf(tmp_path / "m", weights="bin", max_shard_size="50KB")
    shard = page.replace("FIRST", min(f.name for f in folder.glob("*.bin")))
    (folder / shard).write_text("\n<!doctype html><html><body>Sign in</body></html>")
    refused(folder, f"{shard}: is an HTML page")


def test_a_git_lfs_pointer_is_named(tmp_path):
    folder = make_hf(tmp_path / "m")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(folder, "model.safetensors: is a Git LFS pointer")


@pytest.mark.parametrize("path", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, path):
    folder = make_hf(tmp_path / "m", max_shard_size="50KB")
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["lm_head.weight"] = path
    index.write_text(json.dumps(fields))
    refused(folder, "outside of its own folder")


def test_code_in_a_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_hf(tmp_path / "m", weights="bin")
    torch.save({"model.embed_tokens.weight": Surprise()}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin: .*exec")
    assert not (tmp_path / "surprise").exists()


class Surprise:
    def __reduce__(self):
        return exec, ("open('surprise', 'w')",)


def test_a_tensor_of_another_model_is_named(tmp_path):
    folder = make_hf(tmp_path / "m", weights="bin")
    state = tensors()
    torch.save({**state, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, folder / "pytorch_model.bin")
    refused(folder, "q_proj.bias is not in a LLaMA model of 3 layers")
    del state["model.norm.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    refused(folder, "model.norm.weight missing")


def test_two_models_in_one_folder_are_refused(tmp_path):
    folder = make_hf(tmp_path / "m")
    (folder / "params.json").write_text("{}")
    assert open_checkpoint(folder).layout == "hf"  # a params.json beside a config.json is no second model
    (folder / "consolidated.00.pth").write_bytes(b"")
    refused(folder, "holds both Meta's consolidated.NN.pth and Hugging Face's weights")


def test_a_folder_of_something_else_is_named(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("hello")
    refused(tmp_path / "m", r"no checkpoint recognised \(it holds notes.txt\)")
    with pytest.raises(ValueError, match="is a file, expected the folder"):
        open_checkpoint(tmp_path / "m" / "notes.txt")


def test_the_same_tensor_in_two_shards_is_refused(tmp_path):
    folder = make_hf(tmp_path / "m", weights="bin", max_shard_size="60KB")
    shards = sorted(folder.glob("*.bin"))
    first, second = (torch.load(shard, weights_only=True) for shard in shards[:2])
    torch.save({**second, "model.embed_tokens.weight": first["model.embed_tokens.weight"]}, shards[1])
    refused(folder, r"model\.embed_tokens\.weight is in pytorch_model-00001-of-\d+\.bin too")


def test_whole_numbers_are_no_weights(tmp_path):
    folder = make_hf(tmp_path / "m", weights="bin")
    torch.save({name: tensor.to(torch.int8) for name, tensor in tensors().items()}, folder / "pytorch_model.bin")
    refused(folder, "is int8, expected floating-point weights")


def test_a_cast_that_overflows_is_refused(tmp_path):
    held = {name: tensor.to(torch.bfloat16) for name, tensor in tensors().items()}
    held["model.norm.weight"][3] = 1e6
    source = make_hf(tmp_path / "m", memory_reader(CONFIG, held))
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds .*more than float16 can"):
        convert(source, tmp_path / "out", "hf", dtype="float16")
    assert not (tmp_path / "out").exists()
