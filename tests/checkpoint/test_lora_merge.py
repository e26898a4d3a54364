"""Merging: the original's arithmetic bit for bit, as a view and as files; every way to get it silently wrong is an error."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from checkpoint_makers import ALPACA_VOCAB, BASE_VOCAB, CONFIG, PLUS_VOCAB, make_adapter, make_hf, model, snapshot, tensors
from safetensors.torch import load_file, save_file

from pyalpaca.checkpoint import describe_merge, digest, merge, open_checkpoint, write_native
from pyalpaca.checkpoint.adapter import canonical_key
from pyalpaca.checkpoint.meta import meta_name
from pyalpaca.commands import merge_llama_with_chinese_lora, merge_llama_with_chinese_lora_low_mem
from pyalpaca.model import natural_key


def original_merge(state, adapters):
    """The original scripts' loop, restated literally; state: fp16 {name: tensor}, adapters: [(tensors, scaling)]."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    for key in state:
        for adapter, scaling in adapters:
            saved = "base_model.model." + key
            lora_a = saved.replace(".weight", ".lora_A.weight")
            if saved in adapter:
                state[key] = adapter[saved].half().clone()
            if lora_a in adapter:
                lora_b = lora_a.replace("lora_A.weight", "lora_B.weight")
                state[key] += (adapter[lora_b].float() @ adapter[lora_a].float()) * scaling
    return state


def loaded(folder):
    fields = json.loads((folder / "adapter_config.json").read_text())
    return torch.load(folder / "adapter_model.bin", weights_only=True), fields["lora_alpha"] / fields["r"]


def test_the_view_is_bit_equal_to_the_original_scripts(road):
    expected = original_merge(tensors(), [loaded(road.plus), loaded(road.alpaca)])
    view = open_checkpoint(road.base, lora=[road.plus, road.alpaca])
    assert view.config.vocab_size == ALPACA_VOCAB
    assert view.tokenizer == road.alpaca
    assert view.names == list(expected)
    for name in view.names:
        assert view.dtype(name) == torch.float16
        assert torch.equal(view.read(name), expected[name]), name


def test_rounding_once_at_the_end_would_give_other_weights(road):
    name = "model.layers.0.self_attn.q_proj.weight"
    once = tensors()[name].float()
    for adapter, scale in (loaded(road.plus), loaded(road.alpaca)):
        stem = "base_model.model." + name.removesuffix(".weight")
        once += adapter[f"{stem}.lora_B.weight"].float() @ adapter[f"{stem}.lora_A.weight"].float() * scale
    assert not torch.equal(open_checkpoint(road.base, lora=[road.plus, road.alpaca]).read(name), once.half())


def test_a_slice_of_the_view_is_bit_equal_to_the_slice_of_the_whole(road):
    view = open_checkpoint(road.base, lora=[road.plus, road.alpaca])
    for name in view.names:
        whole = view.read(name)
        for dim in range(whole.dim()):
            start, stop = whole.shape[dim] // 3, whole.shape[dim] // 2 + 1
            assert torch.equal(view.read(name, (dim, start, stop)), whole.narrow(dim, start, stop - start))


def test_transposed_adapters_are_transposed(tmp_path):
    base = make_hf(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", targets=("q_proj",))
    fields = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, "fan_in_fan_out": True, "enable_lora": None}))
    state, scale = loaded(adapter)
    name = "model.layers.1.self_attn.q_proj"
    product = (state[f"base_model.model.{name}.lora_B.weight"] @ state[f"base_model.model.{name}.lora_A.weight"]).T * scale
    expected = (tensors()[f"{name}.weight"].float() + product).half()
    assert torch.equal(open_checkpoint(base, lora=[adapter]).read(f"{name}.weight"), expected)


def adapter_of_peft(base, folder, **settings):
    """An adapter that PEFT made with these settings of LoraConfig, its tensors random, saved by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(network, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings}))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    tuned.save_pretrained(folder)
    return folder


PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.0.mlp.down_proj": 5, "^model.layers.1.*up_proj": 3},
    "alpha_pattern": {r"layers\.[12]\..*q_proj": 1, "v_proj": 9, "q_proj": 2},
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers by an old name
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "gate_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "v_proj", "down_proj", "up_proj"], **PATTERNS},
        {"target_modules": ["q_proj", "v_proj", "down_proj", "up_proj"], "use_rslora": True, **PATTERNS},
        {"target_modules": ["o_proj"], "use_rslora": True},
        {"target_modules": ["embed_tokens", "k_proj"]},
        {"target_modules": ["lm_head", "k_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*(q|k)_proj"},
        {"target_modules": ["v_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["v_proj"], "layers_to_transform": 0},
        {"target_modules": ["v_proj", "k_proj"], "exclude_modules": "model.layers.0.*"},
        {"target_modules": ["v_proj"], "bias": "lora_only"},  # of which a LLaMA has none
        {"target_modules": ["v_proj"], "init_lora_weights": "gaussian", "modules_to_save": ["post_attention_layernorm"]},
    ],
    ids=lambda settings: " ".join(f"{key}={value}" for key, value in settings.items())[:70],
)
def test_peft_merges_to_the_same_weights(tmp_path, settings):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_hf(tmp_path / "base", model(dtype=torch.float32))
    adapter = adapter_of_peft(base, tmp_path / "adapter", **settings)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    merged = PeftModel.from_pretrained(network, adapter).merge_and_unload().state_dict()
    view = open_checkpoint(base, lora=[adapter])
    changed = [name for name in view.names if not torch.equal(merged[name], before[name])]
    assert changed and describe_merge(view.names, [adapter])[0].startswith(changed[0])
    for name in view.names:
        torch.testing.assert_close(view.read(name).float(), merged[name], rtol=1e-3, atol=1e-3)
        if view.read(name).dim() == 2:
            assert torch.equal(view.read(name, (1, 8, 24)), view.read(name)[:, 8:24])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers by an old name
def test_peft_reads_an_adapter_that_we_write(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_hf(tmp_path / "base", model(dtype=torch.float32))
    adapter = make_adapter(tmp_path / "adapter", weights="safetensors", vocab=BASE_VOCAB)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    merged = peft.merge_and_unload().state_dict()
    view = open_checkpoint(base, lora=[adapter])
    for name in view.names:
        torch.testing.assert_close(view.read(name).float(), merged[name], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.lm_head.weight",
        "base_model.model.lm_head.modules_to_save.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
        "lm_head.weight",
    ],
)
def test_every_spelling_of_a_full_tensor_is_known(key):
    assert canonical_key(key) == "lm_head.weight"


def test_every_spelling_of_a_factor_is_known(road, tmp_path):
    """Newer PEFT writes `.default.` and safetensors: the merge is the same."""
    renamed = tmp_path / "renamed"
    shutil.copytree(road.plus, renamed)
    state = torch.load(renamed / "adapter_model.bin", weights_only=True)
    (renamed / "adapter_model.bin").unlink()
    new = {
        k.replace("lora_A.weight", "lora_A.default.weight")
        .replace("lora_B.weight", "lora_B.default.weight")
        .replace("lm_head.weight", "lm_head.modules_to_save.default.weight"): v
        for k, v in state.items()
    }
    save_file(new, renamed / "adapter_model.safetensors")
    assert digest(open_checkpoint(road.base, lora=[renamed])) == digest(open_checkpoint(road.base, lora=[road.plus]))


def test_both_scripts_and_both_output_types_hold_the_same_weights(road, tmp_path):
    expected = digest(open_checkpoint(road.base, lora=[road.plus, road.alpaca]))
    adapters = f"{road.plus}, {road.alpaca}"
    for i, command in enumerate((merge_llama_with_chinese_lora, merge_llama_with_chinese_lora_low_mem)):
        for output in ("pth", "huggingface"):
            out = tmp_path / f"{output}{i}"
            arguments = [
                "--base_model",
                str(road.base),
                "--lora_model",
                adapters,
                "--output_type",
                output,
                "--output_dir",
                str(out),
            ]
            assert command.main([*arguments, "--verbose"]) == 0
            assert digest(open_checkpoint(out)) == expected
            assert (out / "tokenizer.model").read_bytes() == (road.alpaca / "tokenizer.model").read_bytes()
    assert (tmp_path / "pth0" / "consolidated.00.pth").exists()


def test_a_bin_base_gives_bin_files_cut_alike_and_a_right_config(road, tmp_path):
    fields = json.loads((road.base / "config.json").read_text())
    base = tmp_path / "base"
    shutil.copytree(road.base, base)
    (base / "config.json").write_text(json.dumps({**fields, "custom": 7}))
    merge(base, [road.plus, road.alpaca], tmp_path / "out")
    names = sorted(f.name for f in road.base.glob("*.bin"))
    assert sorted(f.name for f in (tmp_path / "out").glob("*.bin")) == names
    index, old = (json.loads((d / "pytorch_model.bin.index.json").read_text()) for d in (tmp_path / "out", road.base))
    assert index["weight_map"] == old["weight_map"]
    assert index["metadata"]["total_size"] == sum(
        t.numel() * 2 for n in names for t in torch.load(tmp_path / "out" / n, weights_only=True).values()
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**fields, "custom": 7, "vocab_size": ALPACA_VOCAB, "torch_dtype": "float16"}


def test_a_safetensors_base_gives_safetensors(road, tmp_path):
    base = make_hf(tmp_path / "base", open_checkpoint(road.base))
    merge(base, [road.plus], tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].shape == (PLUS_VOCAB, CONFIG.hidden_size)


def test_transformers_talks_with_the_merged_folder(road, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge(road.base, [road.plus, road.alpaca], tmp_path / "out")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == ALPACA_VOCAB
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert network.get_input_embeddings().weight.shape[0] == ALPACA_VOCAB


# What the original does silently wrong. Each is one sentence, before anything is written.


def refused(road, tmp_path, adapters, match, base=None):
    before = snapshot(tmp_path)
    for to in ("hf", "meta"):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            merge(base or road.base, adapters, tmp_path / "out", to)
    assert snapshot(tmp_path) == before


def test_adapters_in_the_wrong_order_are_refused(road, tmp_path):
    refused(road, tmp_path, [road.alpaca, road.plus], "wrong order.*LLaMA-Plus")


def test_an_adapter_that_matches_nothing_is_refused(road, tmp_path):
    other = make_adapter(tmp_path / "other", config=CONFIG)
    state = torch.load(other / "adapter_model.bin", weights_only=True)
    torch.save({k.replace("layers.0", "layers.30"): v for k, v in state.items()}, other / "adapter_model.bin")
    refused(road, tmp_path, [other], "match nothing in .*layers.30")


def test_an_adapter_for_another_size_is_refused(road, tmp_path):
    from dataclasses import replace

    other = make_adapter(tmp_path / "other", config=replace(CONFIG, hidden_size=128, head_dim=16))
    refused(road, tmp_path, [other], "model of this size")


def test_an_adapter_without_tensors_is_refused(road, tmp_path):
    refused(road, tmp_path, [make_adapter(tmp_path / "empty", targets=())], "holds no tensors")


def test_an_adapter_without_the_embeddings_of_its_tokenizer_is_refused(road, tmp_path):
    lacking = make_adapter(tmp_path / "lacking", tokenizer=road.plus_tokenizer)
    refused(road, tmp_path, [lacking], f"knows {PLUS_VOCAB} tokens.*no embeddings.*has {BASE_VOCAB}")


def test_a_tokenizer_that_does_not_fit_is_refused(road, tmp_path):
    wrong = make_adapter(tmp_path / "wrong", vocab=ALPACA_VOCAB, tokenizer=road.plus_tokenizer)
    refused(road, tmp_path, [wrong], f"knows {PLUS_VOCAB} tokens.*{ALPACA_VOCAB} rows")


def test_a_larger_vocabulary_without_a_tokenizer_for_it_is_refused(road, tmp_path):
    bare = make_adapter(tmp_path / "bare", vocab=PLUS_VOCAB)
    refused(road, tmp_path, [bare], f"base: the tokenizer knows {BASE_VOCAB} tokens, but the merged model has {PLUS_VOCAB}")


def test_embeddings_without_a_head_are_refused(road, tmp_path):
    half = make_adapter(tmp_path / "half", vocab=PLUS_VOCAB)
    state = torch.load(half / "adapter_model.bin", weights_only=True)
    del state["base_model.model.lm_head.weight"]
    torch.save(state, half / "adapter_model.bin")
    refused(road, tmp_path, [half], "lm_head 97, expected as many")


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_a_config_without_rank_or_alpha_is_refused(road, tmp_path, key):
    adapter = make_adapter(tmp_path / "adapter")
    fields = json.loads((adapter / "adapter_config.json").read_text())
    del fields[key]
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    refused(road, tmp_path, [adapter], f"adapter_config.json: {key} is None")


def test_a_rank_that_is_not_the_factors_is_refused(road, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    fields = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, "r": 8}))
    refused(road, tmp_path, [adapter], "has rank 4, but adapter_config.json says r = 8")


def test_half_a_factor_is_refused(road, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    state = torch.load(adapter / "adapter_model.bin", weights_only=True)
    del state["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    torch.save(state, adapter / "adapter_model.bin")
    refused(road, tmp_path, [adapter], "lora_A alone")


def test_one_tensor_under_two_names_is_refused(road, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", vocab=BASE_VOCAB)
    state = torch.load(adapter / "adapter_model.bin", weights_only=True)
    state["base_model.model.lm_head.modules_to_save.weight"] = state["base_model.model.lm_head.weight"]
    torch.save(state, adapter / "adapter_model.bin")
    refused(road, tmp_path, [adapter], "are the same tensor")


def test_an_html_page_is_named(road, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("<!DOCTYPE html><html>log in</html>")
    refused(road, tmp_path, [adapter], "adapter_config.json: is an HTML page, expected JSON")


def test_a_truncated_adapter_is_named(road, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    data = (adapter / "adapter_model.bin").read_bytes()
    (adapter / "adapter_model.bin").write_bytes(data[: len(data) // 2])
    refused(road, tmp_path, [adapter], "adapter_model.bin: is truncated")


def test_an_adapter_as_base_is_refused(road, tmp_path):
    refused(road, tmp_path, [road.alpaca], "is a LoRA adapter, expected a base model", base=road.plus)


def test_missing_folders_are_named(road, tmp_path):
    refused(road, tmp_path, [tmp_path / "nowhere"], "nowhere: not found, expected the folder of a LoRA adapter")
    refused(road, tmp_path, [road.plus], "nowhere: not found, expected a checkpoint", base=tmp_path / "nowhere")


def test_files_of_an_aborted_run_are_not_mixed_in(road, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "consolidated.01.pth").write_bytes(b"of an earlier run")
    with pytest.raises(ValueError, match="would mix with the new files"):
        merge(road.base, [road.plus], out, "meta")
    assert [f.name for f in out.iterdir()] == ["consolidated.01.pth"]


def test_a_second_run_replaces_the_first(road, tmp_path):
    merge(road.base, [road.plus], tmp_path / "out")
    merge(road.base, [road.plus, road.alpaca], tmp_path / "out")
    expected = digest(open_checkpoint(road.base, lora=[road.plus, road.alpaca]))
    assert digest(open_checkpoint(tmp_path / "out")) == expected


def test_adapters_merge_over_any_layout(road, tmp_path):
    expected = digest(open_checkpoint(road.base, lora=[road.plus]))
    write_native(open_checkpoint(road.base), tmp_path / "native")
    assert digest(open_checkpoint(tmp_path / "native", lora=[road.plus])) == expected


def test_a_merge_keeps_the_order_of_the_tensors_in_the_base(road, tmp_path):
    """Releases of transformers before 4.31 stored gate, down, up; the published merges have it from them."""
    shards = sorted(road.base.glob("pytorch_model-*.bin"))
    held = {name: tensor for shard in shards for name, tensor in torch.load(shard, weights_only=True).items()}
    old = sorted(held, key=lambda name: (natural_key(name.partition(".mlp.")[0]), name))
    base = tmp_path / "base"
    shutil.copytree(road.base, base, ignore=shutil.ignore_patterns("pytorch_model*"))
    torch.save({name: held[name] for name in old}, base / "pytorch_model.bin")
    merge(base, [road.plus], tmp_path / "hf", "hf")
    merge(base, [road.plus], tmp_path / "pth", "meta")
    assert list(torch.load(tmp_path / "hf" / "pytorch_model.bin", weights_only=True)) == old
    assert list(torch.load(tmp_path / "pth" / "consolidated.00.pth", weights_only=True)) == [meta_name(name)[0] for name in old]
