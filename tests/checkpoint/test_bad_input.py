"""What users really get wrong, typed at the real commands: one sentence, status 2, and the disk as it was before.

The first group is what the original scripts do wrong without a word. What is refused elsewhere in this folder by function is
not repeated.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoint_makers import (
    ALPACA_VOCAB,
    BASE_VOCAB,
    CONFIG,
    PLUS_VOCAB,
    make_adapter,
    make_hf,
    model,
    snapshot,
    tensors,
)
from safetensors.torch import load_file, save_file

from pyalpaca import cli
from pyalpaca.checkpoint import Published, digest, memory_reader, open_checkpoint, write_megatron, write_meta
from pyalpaca.commands import (
    convert_llama_weights_to_hf,
    convert_weights_from_huggingface,
    merge_llama_with_chinese_lora,
    merge_llama_with_chinese_lora_low_mem,
)

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PAGE = "<!DOCTYPE html><html><body>Sign in</body></html>"


def by_merge(base, adapters, out):
    return cli.main(["merge", str(base), "--lora", ",".join(map(str, adapters)), "--out", str(out)])


def by_convert(base, adapters, out):
    return cli.main(["convert", str(base), str(out), "--to", "megatron", "--lora", ",".join(map(str, adapters))])


def by_script(base, adapters, out):
    names = ", ".join(map(str, adapters))
    flags = ["--base_model", str(base), "--lora_model", names, "--output_dir", str(out), "--output_type", "huggingface"]
    return merge_llama_with_chinese_lora.main(flags)


def by_low_mem_script(base, adapters, out):
    names = ",".join(map(str, adapters))
    return merge_llama_with_chinese_lora_low_mem.main(
        ["--base_model", str(base), "--lora_model", names, "--output_dir", str(out)]
    )


MERGES = [by_merge, by_convert, by_script, by_low_mem_script]


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(match, command): the command ends with status 2 and one sentence that matches, and changes nothing."""

    def check(match, command):
        capsys.readouterr()
        before = snapshot(tmp_path)
        with pytest.raises(SystemExit) as end:
            cli.run(command)
        out, said = capsys.readouterr()
        assert said.startswith("error: ") and said.count("\n") == 1, said
        assert re.search(match, said), said
        assert end.value.code == 2 and out == ""
        assert snapshot(tmp_path) == before

    return check


def edit_json(path, **change):
    fields = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))


def edit_adapter(folder, change):
    """Change {key without prefix: tensor} of an adapter in .bin."""
    prefix = "base_model.model."
    state = torch.load(folder / "adapter_model.bin", weights_only=True)
    state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    change(state)
    torch.save({prefix + key: tensor for key, tensor in state.items()}, folder / "adapter_model.bin")
    return folder


def copied(folder, to):
    shutil.copytree(folder, to)
    return to


# The silent failures of the original scripts, through every command that merges.


def keys_that_match_no_base_key(road, root):
    def rename(state):
        for key in [k for k in state if ".layers.2." in k]:
            state[key.replace(".layers.2.", ".layers.32.")] = state.pop(key)

    return road.base, [edit_adapter(make_adapter(root / "a"), rename)], "3 of 9 tensors match nothing in .*base"


def a_base_without_the_shard_names(road, root):
    base = copied(road.base, root / "base")
    (base / "pytorch_model.bin.index.json").unlink()
    for i, shard in enumerate(sorted(base.glob("pytorch_model-*.bin"))):
        shard.rename(base / f"weights_{i}.bin")
    return base, [road.plus], r"base: no checkpoint recognised \(it holds .*expected .*pytorch_model\*.bin"


def a_tokenizer_larger_than_the_model(road, root):
    return road.base, [make_adapter(root / "a", tokenizer=road.plus_tokenizer)], f"knows {PLUS_VOCAB} tokens, .* no embeddings"


def adapters_reversed(road, root):
    return road.base, [road.alpaca, road.plus], "the adapters are in the wrong order, .*LLaMA-Plus.* before .*Alpaca-Plus"


def a_config_with_an_old_vocabulary(road, root):
    base = copied(road.base, root / "base")
    edit_json(base / "config.json", vocab_size=32)
    return base, [road.plus], f"config.json: vocab_size is 32, but .* has {BASE_VOCAB} rows; set vocab_size to {BASE_VOCAB}"


@pytest.mark.parametrize("command", MERGES)
@pytest.mark.parametrize(
    "made",
    [
        keys_that_match_no_base_key,
        a_base_without_the_shard_names,
        a_tokenizer_larger_than_the_model,
        adapters_reversed,
        a_config_with_an_old_vocabulary,
    ],
)
def test_what_the_original_does_silently_wrong(road, tmp_path, refused, made, command):
    base, adapters, match = made(road, tmp_path)
    refused(match, lambda: command(base, adapters, tmp_path / "out"))


def test_temporary_files_of_an_aborted_run_of_the_original_are_not_mixed_in(road, tmp_path):
    """Its low-memory script leaves L1-consolidated.00.pth and the like, and reads them at the next try."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("L1-consolidated.00.pth", "L2-consolidated.00.pth"):
        torch.save({"layers.0.attention.wq.weight": torch.zeros(64, 64)}, out / name)
    assert by_low_mem_script(road.base, [road.plus], out) == 0
    assert digest(open_checkpoint(out)) == digest(open_checkpoint(road.base, lora=[road.plus]))


@pytest.mark.parametrize("of", ["pytorch_model-00001-of-00009.bin", "model.safetensors", "consolidated.03.pth", "manifest.json"])
def test_weights_of_an_earlier_run_are_not_mixed_in(road, tmp_path, refused, of):
    out = tmp_path / "out"
    out.mkdir()
    (out / of).write_bytes(b"of an earlier run")
    refused(f"out/{of}: belongs to another model", lambda: by_low_mem_script(road.base, [road.plus], out))


# Published adapters are known by their hash: nothing in the files of Alpaca-Plus says that LLaMA-Plus goes first.


@pytest.fixture
def known(road, monkeypatch):
    """Publishes adapters: known(folder, name)."""
    rows = []
    monkeypatch.setattr("pyalpaca.checkpoint.lora.published", lambda: tuple(rows))

    def publish(folder, name):
        file = folder / "adapter_model.bin"
        rows.append(Published(name, file.name, hashlib.sha256(file.read_bytes()).hexdigest(), "lora"))
        return folder

    publish(road.plus, "Chinese-LLaMA-Plus-7B")
    publish(road.alpaca, "Chinese-Alpaca-Plus-7B")
    return publish


@pytest.mark.parametrize("command", MERGES)
def test_alpaca_plus_straight_into_llama(road, tmp_path, refused, known, command):
    match = (
        rf"alpaca: is Chinese-Alpaca-Plus-7B, which belongs on Chinese-LLaMA-Plus-7B, but the model before it has a vocabulary "
        rf"of {BASE_VOCAB}; merge Chinese-LLaMA-Plus-7B before it"
    )
    refused(match, lambda: command(road.base, [road.alpaca], tmp_path / "out"))


def test_the_published_recipe_itself_is_merged(road, known):
    view = open_checkpoint(road.base, lora=[road.plus, road.alpaca])
    assert view.config.vocab_size == ALPACA_VOCAB


def test_published_adapters_on_what_they_do_not_belong_on(road, tmp_path, refused, known):
    out, plus = tmp_path / "out", tmp_path / "plus"
    assert by_merge(road.base, [road.plus], plus) == 0
    again = (
        f"plus: is Chinese-LLaMA-Plus-7B, which belongs on LLaMA itself, but the model before it has a vocabulary of {PLUS_VOCAB}"
    )
    refused(again, lambda: by_merge(plus, [road.plus], out))
    assert by_merge(plus, [road.alpaca], tmp_path / "alpaca") == 0  # LLaMA-Plus may have been merged before
    basic = known(make_adapter(tmp_path / "b", vocab=PLUS_VOCAB, tokenizer=road.plus_tokenizer, seed=7), "Chinese-LLaMA-7B")
    match = "alpaca: is Chinese-Alpaca-Plus-7B, which belongs on Chinese-LLaMA-Plus-7B, but Chinese-LLaMA-7B is merged before it"
    refused(match, lambda: by_merge(road.base, [basic, road.alpaca], out))
    match = "b: is Chinese-LLaMA-7B, which belongs on LLaMA itself, but Chinese-LLaMA-Plus-7B is merged before it"
    refused(match, lambda: by_merge(road.base, [road.plus, basic], out))


# Adapters that are damaged, incomplete, or of a kind that adding B A does not merge.


def config(**change):
    return lambda folder: edit_json(folder / "adapter_config.json", **change)


def weights(change):
    return lambda folder: edit_adapter(folder, change)


def replaced(name, text):
    return lambda folder: (folder / name).write_text(text)


Q = "model.layers.1.self_attn.q_proj"


def one_value(value):
    return lambda state: state[f"{Q}.lora_B.weight"].view(-1)[3:4].fill_(value)


def to_default(state):
    """Two adapters in one file, as a raw state_dict holds them."""
    state[f"{Q}.lora_A.default.weight"] = state[f"{Q}.lora_A.weight"]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (
            weights(one_value(float("nan"))),
            f"adapter_model.bin: .*{Q}.lora_B.weight holds NaN or infinity; the training diverged",
        ),
        (weights(one_value(float("-inf"))), "holds NaN or infinity"),
        (weights(lambda s: s["lm_head.weight"].view(-1)[-1:].fill_(float("nan"))), "lm_head.weight holds NaN or infinity"),
        (
            weights(lambda s: [s.pop(f"{Q}.lora_{x}.weight") for x in "AB"]),
            f"holds no factors for {Q}.weight, which target_modules",
        ),
        (config(modules_to_save=["embed_tokens", "lm_head", "norm"]), "holds no whole model.norm.weight, which modules_to_save"),
        (weights(lambda s: s.update({f"{Q}.lora_A.weight": torch.zeros(0)})), r"lora_A.weight is \(0,\), expected a matrix"),
        (weights(lambda s: s.update({f"{Q}.lora_A.weight": torch.zeros(4, 64).int()})), "is int32, expected floating-point"),
        (
            weights(lambda s: s.update({f"{Q}.lora_B.weight": torch.zeros(64, 3)})),
            r"lora_B @ lora_A of .* is \(64, 3\) @ \(4, 64\)",
        ),
        (weights(lambda s: s.update({f"{Q}.bias": torch.zeros(64)})), r"match nothing in .*q_proj.bias is one"),
        (
            weights(lambda s: s.update({f"{Q}.lora_magnitude_vector": torch.zeros(64)})),
            "match nothing in .*lora_magnitude_vector",
        ),
        (weights(to_default), "lora_A.default.weight and .*lora_A.weight are the same tensor"),
        (config(r=8), r"has rank 4, but adapter_config.json says r = 8; restore the adapter's own config"),
        (config(r=True), "adapter_config.json: r is True, expected a positive number"),
        (config(rank_pattern={"q_proj": 2}), "has rank 4, but adapter_config.json says rank_pattern q_proj = 2"),
        (config(rank_pattern={"q_proj": 0}), r"rank_pattern is \{'q_proj': 0\}, expected positive numbers by module"),
        (config(alpha_pattern=[1]), r"alpha_pattern is \[1\], expected positive numbers by module"),
        (config(alpha_pattern={"(q_proj": 1}), r"alpha_pattern names '\(q_proj', which is no pattern"),
        (config(peft_type="PREFIX_TUNING"), "peft_type is 'PREFIX_TUNING', expected LORA; merge this adapter with peft"),
        (config(use_dora=True), "use_dora is True, which this merge does not know; merge this adapter with peft"),
        (config(lora_bias=True), "lora_bias is True, which this merge does not know"),
        (config(enable_lora=[True, False, True]), "enable_lora is .*, which this merge does not know"),
        (config(trainable_token_indices=[5]), r"trainable_token_indices is \[5\], which this merge does not know"),
        (config(alora_invocation_tokens=[5]), r"alora_invocation_tokens is \[5\], which this merge does not know"),
        (config(layer_replication=[[0, 4]]), "layer_replication is .*, which this merge does not know"),
        (
            config(init_lora_weights="pissa_niter_4"),
            "init_lora_weights is 'pissa_niter_4', so the adapter fits a changed base only",
        ),
        (config(init_lora_weights="OLoRA"), "init_lora_weights is 'OLoRA', so the adapter fits a changed base only"),
        (replaced("adapter_config.json", "[1]"), "adapter_config.json: holds a list, expected a JSON object"),
        (replaced("adapter_config.json", ""), "adapter_config.json: is empty, expected JSON"),
        (replaced("adapter_model.bin", PAGE), "adapter_model.bin: is an HTML page"),
        (replaced("adapter_model.bin", LFS), "adapter_model.bin: is a Git LFS pointer"),
        (replaced("adapter_model.safetensors", LFS), "adapter_model.safetensors: is a Git LFS pointer"),
        (replaced("tokenizer.model", LFS), "a/tokenizer.model: is a Git LFS pointer"),
        (replaced("tokenizer.model", PAGE), "a/tokenizer.model: is an HTML page"),
        (
            lambda folder: (folder / "adapter_model.bin").unlink(),
            "not found, expected adapter_model.safetensors or adapter_model.bin",
        ),
        (lambda folder: (folder / "tokenizer.model").unlink(), f"tokenizer knows {BASE_VOCAB} tokens, but the merged model has"),
    ],
)
def test_an_adapter_that_is_damaged_or_not_understood(road, tmp_path, refused, damage, match):
    adapter = make_adapter(tmp_path / "a", vocab=PLUS_VOCAB, tokenizer=road.plus_tokenizer)
    damage(adapter)
    refused(match, lambda: by_merge(road.base, [adapter], tmp_path / "out"))


@pytest.mark.parametrize(
    "change", [{"enable_lora": None, "merge_weights": False}, {"peft_type": ...}, {"some_new_key": {"x": 1}}]
)
def test_an_old_or_new_config_changes_nothing(road, tmp_path, change):
    adapter = copied(road.plus, tmp_path / "a")
    edit_json(adapter / "adapter_config.json", **change)
    assert digest(open_checkpoint(road.base, lora=[adapter])) == digest(open_checkpoint(road.base, lora=[road.plus]))


def test_an_adapter_without_a_tokenizer_for_its_vocabulary(tmp_path, refused):
    base, adapter = make_hf(tmp_path / "base"), make_adapter(tmp_path / "a", vocab=PLUS_VOCAB)
    refused(f"a: brings a vocabulary of {PLUS_VOCAB}, but no tokenizer for it", lambda: by_merge(base, [adapter], tmp_path / "o"))


def test_adapters_that_are_no_list_of_adapters(road, tmp_path, refused):
    out, adapter = tmp_path / "out", make_adapter(tmp_path / "a")
    refused("a: is given twice, an adapter is merged once", lambda: by_merge(road.base, [adapter, adapter], out))
    refused("no adapter given to merge", lambda: cli.main(["merge", str(road.base), "--lora", " , ", "--out", str(out)]))
    refused("base/adapter_config.json: not found, so base is no LoRA adapter", lambda: by_merge(road.base, [road.base], out))
    refused("plus: is a LoRA adapter, expected a base model", lambda: by_script(road.plus, [road.alpaca], out))
    refused("x,y/nowhere: not found, expected", lambda: by_merge(tmp_path / "x,y" / "nowhere", [road.plus], out))


# Outputs.


def test_an_output_that_is_the_base(road, tmp_path, refused, monkeypatch):
    base = copied(road.base, tmp_path / "base")
    refused("base: is what is being read; choose another output", lambda: by_script(base, [road.plus], base))
    (tmp_path / "link").symlink_to(base)
    refused("link: is what is being read; choose another output", lambda: by_script(base, [road.plus], tmp_path / "link"))
    monkeypatch.chdir(base)  # where the script's default of ./ writes
    flags = ["--base_model", str(base), "--lora_model", str(road.plus), "--output_type", "huggingface"]
    refused("is what is being read; choose another output", lambda: merge_llama_with_chinese_lora.main(flags))


def test_an_output_that_is_no_folder(road, tmp_path, refused):
    (tmp_path / "notes.txt").write_text("mine")
    refused(
        "notes.txt: is a file, expected a folder or nothing", lambda: by_merge(road.base, [road.plus], tmp_path / "notes.txt")
    )
    refused("notes.txt/out", lambda: by_merge(road.base, [road.plus], tmp_path / "notes.txt" / "out"))


# Models.


def test_heads_that_do_not_divide(tmp_path, refused):
    base = make_hf(tmp_path / "base")
    edit_json(base / "config.json", num_attention_heads=7, num_key_value_heads=7, head_dim=...)
    match = "config.json: hidden_size 64 can't be divided by 7 heads, and no head_dim is given"
    refused(match, lambda: cli.main(["convert", str(base), str(tmp_path / "out"), "--to", "meta"]))
    write_meta(model(), tmp_path / "meta")
    edit_json(tmp_path / "meta" / "params.json", n_heads=7)
    flags = ["--input_dir", str(tmp_path / "meta"), "--output_dir", str(tmp_path / "out")]
    refused("params.json: dim 64 can't be divided by 7 heads", lambda: convert_llama_weights_to_hf.main(flags))
    edit_json(tmp_path / "meta" / "params.json", n_heads=8, n_kv_heads=3)
    refused("params.json: model config: 8 heads can't share 3", lambda: convert_llama_weights_to_hf.main(flags))


def test_52_heads_for_8_ranks(tmp_path, refused):
    base = make_hf(tmp_path / "33B", model(replace(CONFIG, hidden_size=104, num_heads=52, num_kv_heads=52, head_dim=2)))
    flags = ["--input-model-dir", str(base), "--output-model-dir", str(tmp_path / "out"), "--tensor-model-parallel-size", "8"]
    match = "52 heads can't be cut in 8 equal parts; choose a tensor-parallel size that divides"
    refused(match, lambda: convert_weights_from_huggingface.main(flags))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_an_embedding_and_a_head_of_different_vocabularies(tmp_path, refused, name):
    base = make_hf(tmp_path / "base")
    state = load_file(base / "model.safetensors")
    save_file({**state, name: torch.zeros(BASE_VOCAB + 1, 64, dtype=torch.float16)}, base / "model.safetensors")
    match = {"lm_head.weight": f"lm_head.weight is {BASE_VOCAB + 1} x 64, expected {BASE_VOCAB} x 64"}.get(name, "has 98 rows")
    refused(match, lambda: cli.main(["convert", str(base), str(tmp_path / "out"), "--to", "native"]))
    write_meta(model(), tmp_path / "meta", num_shards=2)
    key = {"lm_head.weight": "output.weight"}.get(name, "tok_embeddings.weight")
    for i in range(2):
        shard = torch.load(tmp_path / "meta" / f"consolidated.0{i}.pth", weights_only=True)
        shard[key] = torch.cat([shard[key], shard[key][:1]])
        torch.save(shard, tmp_path / "meta" / f"consolidated.0{i}.pth")
    flags = ["--input_dir", str(tmp_path / "meta"), "--output_dir", str(tmp_path / "out")]
    refused(r"meta: model.embed_tokens.weight is \d+ x 64, expected", lambda: convert_llama_weights_to_hf.main(flags))


def test_a_params_json_with_an_old_vocabulary(tmp_path, refused):
    write_meta(model(), tmp_path / "meta")
    edit_json(tmp_path / "meta" / "params.json", vocab_size=32)
    flags = ["--input_dir", str(tmp_path / "meta"), "--output_dir", str(tmp_path / "out")]
    match = f"params.json: vocab_size is 32, but output.weight has {BASE_VOCAB} rows; set vocab_size to {BASE_VOCAB}"
    refused(match, lambda: convert_llama_weights_to_hf.main(flags))


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_positions_that_no_table_holds(tmp_path, refused, kind):
    base = make_hf(tmp_path / "base")
    edit_json(base / "config.json", rope_scaling={"type": kind, "factor": 2.0})
    match = f"config.json: model config: rope scaling '{kind}' is not one of default, linear, llama3"
    refused(match, lambda: cli.main(["convert", str(base), str(tmp_path / "out"), "--to", "megatron"]))


def test_a_padded_vocabulary_that_is_taken_for_the_real_one(tmp_path, refused):
    write_megatron(model(), tmp_path / "mg", tp=2)
    (tmp_path / "mg" / "config.json").unlink()
    command = ["convert", str(tmp_path / "mg"), str(tmp_path / "out"), "--to", "hf"]
    refused("vocabulary", lambda: cli.main(command))
    refused("vocabulary", lambda: cli.main([*command, "--vocab-size", "300"]))


def test_a_base_of_another_size_than_its_adapter(road, tmp_path, refused):
    wide = make_hf(tmp_path / "wide", model(replace(CONFIG, hidden_size=128, head_dim=16), tokenizer=road.base_tokenizer))
    refused(r"plus/.*is this the adapter for a model of this size\?", lambda: by_merge(wide, [road.plus], tmp_path / "out"))
    deep = memory_reader(replace(CONFIG, num_layers=2), tensors(replace(CONFIG, num_layers=2)), road.base_tokenizer)
    shallow = make_hf(tmp_path / "shallow", deep)
    match = r"match nothing in .*shallow \(model.layers.2.*is this the adapter for a model of 2 layers"
    refused(match, lambda: by_merge(shallow, [road.plus], tmp_path / "out"))


def test_tied_embeddings_and_an_adapter_with_a_head(road, tmp_path, refused):
    tied = make_hf(tmp_path / "tied", model(replace(CONFIG, tie_embeddings=True), tokenizer=road.base_tokenizer))
    match = "plus: has an lm_head of its own, but the embeddings of .*tied are tied; untie them first"
    refused(match, lambda: by_merge(tied, [road.plus], tmp_path / "out"))


def test_a_tokenizer_of_the_base_that_is_no_tokenizer(road, tmp_path, refused):
    base = copied(road.base, tmp_path / "base")
    (base / "tokenizer.model").write_text(LFS)
    bare = make_adapter(tmp_path / "bare", vocab=PLUS_VOCAB)
    refused("base/tokenizer.model: is a Git LFS pointer", lambda: by_merge(base, [bare], tmp_path / "out"))
