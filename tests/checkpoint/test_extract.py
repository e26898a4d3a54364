"""Adapters out of trained checkpoints: a run's factors to the bit, a difference as well as its rank allows; PEFT reads both."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_makers import ALPACA_VOCAB, CONFIG, PLUS_VOCAB, make_adapter, make_hf, make_tokenizer, model, snapshot, tensors
from safetensors.torch import load_file

from pyalpaca.checkpoint import (
    cast,
    digest,
    memory_reader,
    merge,
    native_tensors,
    open_checkpoint,
    write_adapter,
    write_hf,
    write_megatron,
    write_meta,
    write_native_manifest,
    write_native_shard,
)
from pyalpaca.checkpoint.extract import low_rank
from pyalpaca.commands import extract
from pyalpaca.model import lora_parameters, parameters

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by an old name
WORDS = torch.randint(0, 90, (2, 20), generator=torch.Generator().manual_seed(0))


def run_extract(capsys, *arguments):
    """(lines, last line as JSON) of the command."""
    capsys.readouterr()
    assert extract.main([str(a) for a in arguments]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def logits_of(folder):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(WORDS).logits


def logits_of_peft(base, adapter, rows=None):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if rows:
        network.resize_token_embeddings(rows)
    with torch.no_grad():
        return PeftModel.from_pretrained(network, adapter).eval()(WORDS).logits


def assert_equal_but_for_rounding(a, b, units=1):
    """Every tensor is the same up to fp16 units in the last place, of the element or of the tensor's usual size."""
    assert a.names == b.names
    for name in a.names:
        x, y = a.read(name).float(), b.read(name).float()
        size = torch.maximum(torch.maximum(x.abs(), y.abs()), y.square().mean().sqrt())
        unit = 2.0 ** (torch.frexp(size).exponent - 11)
        assert ((x - y).abs() <= units * unit).all(), name


def half(reader):
    return cast(reader, torch.float16)


def changed(change, dtype=torch.float16, config=CONFIG):
    """The usual weights after `change`, which gets {name: tensor}."""
    whole = {name: tensor.clone() for name, tensor in tensors(config, dtype).items()}
    change(whole)
    return memory_reader(config, whole)


def on_a_grid():
    """Weights that are odd multiples of 1/512: sums with even ones are exact in fp16, and never 0."""
    return {name: ((tensor * 256).floor() + 0.5).half() / 256 for name, tensor in tensors(dtype=torch.float32).items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(base, run): a run of three steps that trained factors, the embeddings and the head."""
    from pyalpaca.data import indexed_writer
    from pyalpaca.train import TrainConfig, train

    root = tmp_path_factory.mktemp("trained")
    base = make_hf(root / "base", model(dtype=torch.float32, tokenizer=make_tokenizer(root / "tokenizer", CONFIG.vocab_size)))
    for key in ("input_ids", "labels"):
        with indexed_writer(root / f"data_packed_{key}_document") as writer:
            for i in range(4):
                writer.add([1, *range(3 + i, 15 + i), 2])
                writer.end_document()
    usual = {"seq_length": 16, "micro_batch_size": 2, "global_batch_size": 4, "steps": 3, "lr": 2e-2}
    lora = {"lora_r": 3, "lora_alpha": 12.0, "lora_targets": "q_proj,down_proj", "lora_full": "embed_tokens,lm_head"}
    train(TrainConfig(model=str(base), data=str(root / "data"), output=str(root / "run"), **usual, **lora))
    return base, root / "run"


def test_a_run_gives_its_factors_to_the_bit(trained, tmp_path, capsys):
    base, run = trained
    lines, said = run_extract(capsys, run, tmp_path / "adapter")
    stored, held = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), native_tensors(run, "model")
    factors = {p.name for p in lora_parameters(parameters(CONFIG), 3, ["q_proj", "down_proj"])}
    whole = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {key.removeprefix("base_model.model.") for key in stored} == factors | whole
    for name in factors | whole:
        assert torch.equal(stored[f"base_model.model.{name}"], held.read(name, None)), name
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 12, str(base))
    assert (config["target_modules"], config["modules_to_save"]) == (["q_proj", "down_proj"], ["embed_tokens", "lm_head"])
    assert (tmp_path / "adapter" / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert lines[0].split() == ["whole", "model.embed_tokens.weight"]
    assert said["source"] == "run" and said["factors"] == 6 and sorted(said["whole"]) == sorted(whole)
    assert said["unchanged"] == len(parameters(CONFIG)) - 8


def test_peft_computes_with_a_runs_adapter_what_the_run_computes(trained, tmp_path, capsys):
    base, run = trained
    run_extract(capsys, run, tmp_path / "adapter", "--base", base)
    write_hf(open_checkpoint(run), tmp_path / "merged")
    expected = logits_of(tmp_path / "merged")
    assert (expected - logits_of(base)).abs().max() > 0.1
    torch.testing.assert_close(logits_of_peft(base, tmp_path / "adapter"), expected, rtol=1e-5, atol=1e-5)


def test_merging_a_runs_adapter_again_gives_the_trained_weights(trained, tmp_path, capsys):
    base, run = trained
    run_extract(capsys, run, tmp_path / "adapter", "--weights", "bin")
    assert (tmp_path / "adapter" / "adapter_model.bin").exists()
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    assert_equal_but_for_rounding(open_checkpoint(tmp_path / "merged"), half(open_checkpoint(run)))


def test_a_run_is_compared_with_the_base_that_is_given(trained, tmp_path):
    _, run = trained
    other = make_hf(tmp_path / "other", changed(lambda w: w["model.norm.weight"].add_(1), torch.float32))
    with pytest.raises(ValueError, match=r"other: model.norm.weight is not that of .*, which did not train it"):
        extract.main([str(run), str(tmp_path / "out"), "--base", str(other)])


def write_factors(run, change=lambda whole: None, ranks=(2, 2)):
    """A native checkpoint of factors without an optimizer's state, as another program may write it."""
    whole = dict(tensors(dtype=torch.float32))
    change(whole)
    for module, rank in zip(("q_proj", "up_proj"), ranks, strict=True):
        whole |= {p.name: torch.randn(p.shape) * 0.1 for p in lora_parameters(parameters(CONFIG), rank, [module])}
    run.mkdir()
    held = {name: (tensor, tuple(tensor.shape), None) for name, tensor in whole.items()}
    entries = write_native_shard(run, "all", held, "model")
    write_native_manifest(run, replace(CONFIG, lora_scale=0.5), entries, {})
    return run


def test_without_the_optimizers_state_the_base_says_what_was_trained_whole(tmp_path, capsys):
    base = make_hf(tmp_path / "base", model())
    run = write_factors(tmp_path / "run", lambda whole: whole["lm_head.weight"].mul_(2))
    for name, tensor in tensors().items():  # the base is the run's, in fp16
        assert torch.equal(tensor.float(), tensors(dtype=torch.float32)[name].half().float())
    with pytest.raises(ValueError, match="lacks its optimizer's state, which says what was trained whole; give --base"):
        extract.main([str(run), str(tmp_path / "out")])
    _, said = run_extract(capsys, run, tmp_path / "out", "--base", base)
    assert said["whole"] == ["lm_head.weight"] and said["lora_alpha"] == 1 and said["target_modules"] == ["q_proj", "up_proj"]


def test_factors_of_several_ranks_are_fitted_only(tmp_path, capsys):
    base, run = make_hf(tmp_path / "base", model(dtype=torch.float32)), write_factors(tmp_path / "run", ranks=(2, 4))
    with pytest.raises(ValueError, match=r"holds factors of ranks \[2, 4\], an adapter has one; give --rank and --base"):
        extract.main([str(run), str(tmp_path / "out"), "--base", str(base)])
    _, said = run_extract(capsys, run, tmp_path / "out", "--base", base, "--rank", "4")
    assert said["source"] == "difference" and said["largest_error"] < 1e-4


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_a_difference_of_low_rank_is_found_again(tmp_path, capsys, weights):
    base, adapter = make_hf(tmp_path / "base"), make_adapter(tmp_path / "adapter", r=4)
    merge(base, [adapter], tmp_path / "merged")
    lines, said = run_extract(
        capsys, tmp_path / "merged", tmp_path / "again", "--base", base, "--rank", "4", "--weights", weights, "--alpha", "16"
    )
    assert said["target_modules"] == ["q_proj", "v_proj", "down_proj"] and said["lora_alpha"] == 16
    assert said["least_energy"] > 1 - 1e-6 and said["largest_error"] < 1e-2
    assert lines[0].startswith("kept 100.0000%  error ") and lines[0].endswith(" model.layers.0.self_attn.q_proj.weight")
    merge(base, [tmp_path / "again"], tmp_path / "merged-again")
    assert_equal_but_for_rounding(open_checkpoint(tmp_path / "merged-again"), open_checkpoint(tmp_path / "merged"))


def test_a_difference_without_rounding_is_found_to_the_bit(tmp_path, capsys):
    base = make_hf(tmp_path / "base", memory_reader(CONFIG, on_a_grid()))
    made = {}
    for p in lora_parameters(parameters(CONFIG), 2, ["k_proj", "gate_proj"]):
        made[p.name] = torch.randint(-3, 4, p.shape, generator=torch.Generator().manual_seed(len(made))) / 8.0
    write_adapter(tmp_path / "adapter", made, r=2, lora_alpha=1.0, target_modules=["k_proj", "gate_proj"])
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    run_extract(capsys, tmp_path / "merged", tmp_path / "again", "--base", base, "--rank", "3", "--alpha", "5")
    assert digest(open_checkpoint(base, lora=[tmp_path / "again"])) == digest(open_checkpoint(tmp_path / "merged"))


def test_a_vocabulary_that_grew_is_stored_whole(road, tmp_path, capsys):
    merge(road.base, [road.plus, road.alpaca], tmp_path / "merged")
    _, said = run_extract(capsys, tmp_path / "merged", tmp_path / "adapter", "--base", road.base, "--rank", "6")
    assert said["whole"] == ["model.embed_tokens.weight", "lm_head.weight"]
    view, merged = open_checkpoint(road.base, lora=[tmp_path / "adapter"]), open_checkpoint(tmp_path / "merged")
    assert view.config.vocab_size == ALPACA_VOCAB and view.tokenizer == tmp_path / "adapter"
    assert_equal_but_for_rounding(view, merged, units=2)  # rounded after each of two adapters, and once more
    stages = ["--base", road.base, "--lora", road.plus, "--rank", "2"]
    run_extract(capsys, tmp_path / "merged", tmp_path / "alpaca", *stages)
    assert_equal_but_for_rounding(open_checkpoint(road.base, lora=[road.plus, tmp_path / "alpaca"]), merged)


def test_peft_computes_with_an_extracted_adapter_what_the_trained_model_computes(tmp_path, capsys):
    base = make_hf(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", vocab=PLUS_VOCAB, tokenizer=make_tokenizer(tmp_path / "t", PLUS_VOCAB))
    merge(base, [adapter], tmp_path / "merged")

    def also(whole):
        whole.update({n: t.float() for n, t in load_file(tmp_path / "merged" / "model.safetensors").items()})
        whole["model.norm.weight"].mul_(1.5)
        whole["model.layers.1.input_layernorm.weight"].mul_(0.5)

    after = changed(also, torch.float32, replace(CONFIG, vocab_size=PLUS_VOCAB))
    write_hf(replace(after, tokenizer=tmp_path / "t"), tmp_path / "trained")
    _, said = run_extract(capsys, tmp_path / "trained", tmp_path / "again", "--base", base, "--rank", "64")
    saved = json.loads((tmp_path / "again" / "adapter_config.json").read_text())["modules_to_save"]
    assert saved == ["embed_tokens", "input_layernorm", "lm_head", "model.norm"]
    assert "model.layers.2.input_layernorm.weight" in said["whole"]  # PEFT names a layer's norm by its kind
    expected = logits_of(tmp_path / "trained")
    torch.testing.assert_close(logits_of_peft(base, tmp_path / "again", PLUS_VOCAB), expected, rtol=1e-3, atol=1e-3)
    assert_equal_but_for_rounding(open_checkpoint(base, lora=[tmp_path / "again"]), half(open_checkpoint(tmp_path / "trained")))


def test_layers_that_did_not_change_get_no_factors(tmp_path, capsys):
    base = make_hf(tmp_path / "base", model(dtype=torch.float32))
    one = "model.layers.1.self_attn.v_proj"
    write_hf(changed(lambda w: w[f"{one}.weight"][3:5].add_(1), torch.float32), tmp_path / "trained")
    _, said = run_extract(capsys, tmp_path / "trained", tmp_path / "a", "--base", base, "--rank", "1")
    assert said["target_modules"] == [one] and said["factors"] == 1 and said["unchanged"] == len(parameters(CONFIG)) - 1
    torch.testing.assert_close(logits_of_peft(base, tmp_path / "a"), logits_of(tmp_path / "trained"), rtol=1e-4, atol=1e-4)


def test_where_only_whole_tensors_changed_one_factor_of_nothing_makes_it_an_adapter(tmp_path, capsys):
    base = make_hf(tmp_path / "base", model(dtype=torch.float32))
    write_hf(changed(lambda w: w["model.embed_tokens.weight"].mul_(3), torch.float32), tmp_path / "trained")
    _, said = run_extract(capsys, tmp_path / "trained", tmp_path / "a", "--base", base)
    assert said["whole"] == ["model.embed_tokens.weight"] and said["energy"] == 1
    torch.testing.assert_close(logits_of_peft(base, tmp_path / "a"), logits_of(tmp_path / "trained"), rtol=1e-4, atol=1e-4)


def test_the_energy_kept_is_that_of_the_largest_singular_values(tmp_path, capsys):
    name = "model.layers.0.mlp.up_proj.weight"
    base, generator = make_hf(tmp_path / "base", model(dtype=torch.float32)), torch.Generator().manual_seed(1)
    difference = torch.randn(96, 64, generator=generator)
    write_hf(changed(lambda w: w[name].add_(difference), torch.float32), tmp_path / "trained")
    _, said = run_extract(capsys, tmp_path / "trained", tmp_path / "a", "--base", base, "--rank", "5")
    s = torch.linalg.svdvals(difference.double()).square()
    assert said["energy"] == pytest.approx(float(s[:5].sum() / s.sum()), rel=1e-4)
    product = open_checkpoint(base, lora=[tmp_path / "a"]).read(name).float() - tensors(dtype=torch.float32)[name]
    lost = (difference - product).abs().max() / difference.abs().max()
    assert said["largest_error"] == pytest.approx(float(lost), rel=1e-2)


def test_the_random_subspace_finds_the_best_factors_and_always_the_same():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 540, generator=generator)).Q for n in (700, 540))
    s = 1.0 / torch.arange(1, 541) ** 0.5  # a spectrum that falls slowly is the hard case
    matrix = (u * s) @ v.T
    b, a = low_rank(matrix, 24)
    assert (b.shape, a.shape) == ((700, 24), (24, 540))
    lost = (matrix - b @ a).square().sum().sqrt()
    assert float(lost) < 1.002 * float(s[24:].square().sum().sqrt())
    assert all(torch.equal(x, y) for x, y in zip(low_rank(matrix, 24), (b, a), strict=True))
    exact = (u[:, :9] * s[:9]) @ v[:, :9].T
    b, a = low_rank(exact, 9)
    torch.testing.assert_close(b @ a, exact, rtol=0, atol=1e-6)


def test_any_two_layouts_can_be_compared(tmp_path, capsys):
    adapter = make_adapter(tmp_path / "adapter", r=2)
    write_meta(model(), tmp_path / "meta", num_shards=2)
    write_megatron(open_checkpoint(tmp_path / "meta", lora=[adapter]), tmp_path / "megatron", tp=2, pp=3)
    _, said = run_extract(capsys, tmp_path / "megatron", tmp_path / "again", "--base", tmp_path / "meta", "--rank", "2")
    assert said["factors"] == 9
    view = open_checkpoint(tmp_path / "meta", lora=[tmp_path / "again"])
    assert_equal_but_for_rounding(view, open_checkpoint(tmp_path / "megatron"))


@pytest.mark.parametrize(("dtype", "whole"), [("float16", torch.float16), ("bfloat16", torch.bfloat16), (None, torch.float32)])
def test_what_is_stored_has_the_type_that_is_asked_for(tmp_path, capsys, dtype, whole):
    base = make_hf(tmp_path / "base", model(dtype=torch.float32))

    def change(w):
        w["lm_head.weight"].add_(1)
        w["model.layers.0.mlp.up_proj.weight"][:3] += 1

    write_hf(changed(change, torch.float32), tmp_path / "trained")
    _, said = run_extract(
        capsys, tmp_path / "trained", tmp_path / "a", "--base", base, "--rank", "1", *(["--dtype", dtype] if dtype else [])
    )
    assert {t.dtype for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values()} == {whole}
    assert said["energy"] > 0.999


def test_another_type_alone_is_no_change(tmp_path):
    base = make_hf(tmp_path / "base", model(dtype=torch.float32))
    write_hf(half(model(dtype=torch.float32)), tmp_path / "trained")
    with pytest.raises(ValueError, match=r"trained: equals .*base in every tensor, so there is nothing to extract"):
        extract.main([str(tmp_path / "trained"), str(tmp_path / "a"), "--base", str(base)])


def reshaped(**fields):
    return lambda tmp_path: make_hf(tmp_path / "other", model(replace(CONFIG, **fields)))


def spoiled(name, value):
    return lambda tmp_path: make_hf(tmp_path / "other", changed(lambda w: w[name].view(-1)[:1].fill_(value)))


Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.2.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("make", "flags", "match"),
    [
        (spoiled(Q, 1.0), [], "no base is given to compare it with, and it holds no LoRA factors itself; give --base"),
        (spoiled(Q, 1.0), ["--rank", "65", "--base", "BASE"], "rank 65 is not possible for .*down_proj.weight, which is 64 x 96"),
        (spoiled(Q, 1.0), ["--rank", "0", "--base", "BASE"], "rank 0 is not possible"),
        (spoiled(Q, 1.0), ["--alpha", "-2", "--base", "BASE"], "alpha -2 is not possible; choose a positive number"),
        (spoiled(Q, 1.0), ["--targets", "", "--base", "BASE"], "no targets to fit; name some of q_proj,"),
        (spoiled(Q, 1.0), ["--targets", "c_attn", "--base", "BASE"], "LoRA target c_attn matches no projection"),
        (spoiled(K, 1.0), ["--targets", "q_proj,v_proj", "--base", "BASE"], "k_proj differ from .*, and are no targets"),
        (spoiled(Q, float("nan")), ["--base", "BASE"], "q_proj.weight differs by NaN or infinity"),
        (spoiled(Q, 1.0), ["--base", "nowhere"], "nowhere: not found, expected a checkpoint folder"),
        (spoiled(Q, 1.0), ["--lora", "a"], "--lora names adapters to merge into the base; give --base too"),
        (reshaped(num_layers=2), ["--base", "BASE"], "num_layers is 2, in .*base it is 3"),
        (reshaped(hidden_size=32, num_heads=4, num_kv_heads=4), ["--base", "BASE"], "hidden_size is 32, in .*base it is 64"),
        (reshaped(rope_theta=5e5), ["--base", "BASE"], "rope_theta is 500000.0, in .*base it is 10000.0"),
        (reshaped(tie_embeddings=True), ["--base", "BASE"], "tie_embeddings is True, in .*base it is False"),
        (reshaped(vocab_size=90), ["--base", "BASE"], "has a vocabulary of 90, less than the 97 of .*base"),
        (lambda tmp_path: tmp_path / "base", ["--base", "BASE"], "equals .*base in every tensor, so there is nothing to extract"),
        (lambda tmp_path: make_adapter(tmp_path / "x"), ["--base", "BASE"], "is a LoRA adapter, expected a base model"),
        (lambda tmp_path: write_factors(tmp_path / "run"), ["--alpha", "4"], "holds LoRA factors, which have their scale"),
    ],
)
def test_what_no_adapter_can_say_is_refused(tmp_path, make, flags, match):
    base = make_hf(tmp_path / "base")
    trained = make(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        extract.main([str(trained), str(tmp_path / "out"), *(str(base) if f == "BASE" else f for f in flags)])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("out", "match"),
    [
        ("base", "model.safetensors: belongs to another model"),
        ("trained", "model.safetensors: belongs to another model"),
        ("trained/config.json", "config.json: is a file, expected a folder"),
        ("adapter", "adapter_model.bin: belongs to another model"),
    ],
)
def test_an_output_that_is_something_else_is_refused_before_the_work(tmp_path, monkeypatch, out, match):
    make_hf(tmp_path / "base")
    make_hf(tmp_path / "trained", spoil(tmp_path))
    make_adapter(tmp_path / "adapter", weights="bin")
    before = snapshot(tmp_path)
    monkeypatch.setattr(sys.modules["pyalpaca.checkpoint.extract"], "low_rank", None)
    with pytest.raises(ValueError, match=match):
        extract.main([str(tmp_path / "trained"), str(tmp_path / out), "--base", str(tmp_path / "base")])
    assert snapshot(tmp_path) == before


def spoil(tmp_path: Path):
    return changed(lambda w: w[Q].view(-1)[:1].fill_(1.0))


def test_an_adapter_is_replaced_by_one_of_its_kind(tmp_path, capsys):
    base = make_hf(tmp_path / "base")
    make_hf(tmp_path / "trained", spoil(tmp_path))
    make_adapter(tmp_path / "adapter", weights="safetensors")
    run_extract(capsys, tmp_path / "trained", tmp_path / "adapter", "--base", base, "--rank", "1")
    assert_equal_but_for_rounding(open_checkpoint(base, lora=[tmp_path / "adapter"]), open_checkpoint(tmp_path / "trained"))
