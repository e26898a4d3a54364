"""Meta's layout: the permutation of q and k, shards, params.json, and what is wrong with a download."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from checkpoint_makers import CONFIG, make_hf, make_tokenizer, model, snapshot, tensors

from pyalpaca.checkpoint import SIZES, convert, digest, open_checkpoint, write_meta
from pyalpaca.checkpoint.meta import deinterleave, interleave, params_json
from pyalpaca.commands import convert_llama_weights_to_hf
from pyalpaca.model import LlamaConfig

PUBLISHED = {
    "7B": "7e89e242ddc0dd6f060b43ca219ce8b3e8f08959a72cb3c0855df8bb04d46265",
    "13B": "4ab77bec4d4405ccb66a97b282574c89a94417e3c32e5f68f37e2876fc21322f",
    "33B": "2c07118ea98d69dbe7810d88520e30288fa994751b337f8fca02b171955f44cb",
    "65B": "999ed1659b469ccc2a941714c0a9656fa571d17c9f7c8c7589817ca90edef51b",
}


def published(name: str) -> LlamaConfig:
    size = SIZES[name]
    return LlamaConfig(
        49954, size.hidden_size, size.intermediate_size, size.num_layers, size.num_heads, size.num_heads, 128, norm_eps=1e-6
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_params_json_is_the_original_to_the_byte(name):
    text = json.dumps(params_json(published(name)))
    assert hashlib.sha256(text.encode()).hexdigest() == PUBLISHED[name]


def test_llama_2_keeps_its_own_epsilon():
    assert params_json(replace(published("7B"), norm_eps=1e-5, max_positions=4096))["norm_eps"] == 1e-5


def test_interleaved_and_half_split_rotations_give_the_same_scores():
    """Meta turns neighbouring pairs, Hugging Face the halves: with permuted rows, q . k is the same at all pairs of positions."""
    heads, d, D, positions = 3, 8, 16, torch.arange(5.0)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(heads * d, D, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.randn(5, D, generator=generator, dtype=torch.float64)
    angle = positions[:, None, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)

    def half_split(w):
        y = (x @ w.T).view(5, heads, 2, d // 2)
        return torch.view_as_real(torch.complex(y[:, :, 0], y[:, :, 1]) * turn).flatten(-2)

    def interleaved(w):
        y = (x @ w.T).view(5, heads, d // 2, 2)
        return torch.view_as_real(torch.view_as_complex(y) * turn).flatten(-2)

    def scores(q, k):
        return torch.einsum("shd,thd->hst", q, k)

    expected = scores(half_split(q), half_split(k))
    torch.testing.assert_close(scores(interleaved(interleave(q, d)), interleaved(interleave(k, d))), expected)
    assert torch.equal(deinterleave(interleave(q, d), d), q)
    assert not torch.equal(interleave(q, d), q)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, num_kv_heads=4)], ids=["mha", "gqa"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_any_number_of_shards_holds_the_same_model(tmp_path, config, n):
    write_meta(model(config), tmp_path / "meta", num_shards=n)
    reader = open_checkpoint(tmp_path / "meta")
    assert len(list((tmp_path / "meta").glob("consolidated.*.pth"))) == n
    assert reader.config == config
    assert digest(reader) == digest(model(config))
    for name, tensor in tensors(config).items():
        for dim in range(tensor.dim()):
            start, stop = tensor.shape[dim] // 3, tensor.shape[dim] // 2 + 3
            assert torch.equal(reader.read(name, (dim, start, stop)), tensor.narrow(dim, start, stop - start)), name


def test_shards_are_cut_as_meta_cuts_them(tmp_path):
    """The remainder of the vocabulary goes to the last shard's output; the embedding is cut by columns."""
    write_meta(model(), tmp_path, num_shards=4)
    for i in range(4):
        shard = torch.load(tmp_path / f"consolidated.{i:02d}.pth", weights_only=True)
        shapes = {key: tuple(t.shape) for key, t in shard.items()}
        assert shapes["output.weight"] == (25 if i == 3 else 24, 64)
        assert shapes["tok_embeddings.weight"] == (97, 16)
        assert shapes["layers.2.attention.wq.weight"] == (16, 64)
        assert shapes["layers.2.attention.wo.weight"] == (64, 16)
        assert shapes["layers.2.feed_forward.w1.weight"] == shapes["layers.2.feed_forward.w3.weight"] == (24, 64)
        assert shapes["layers.2.feed_forward.w2.weight"] == (64, 24)
        assert shapes["norm.weight"] == (64,)
        assert all(t.untyped_storage().nbytes() == t.numel() * 2 for t in shard.values())
    assert (tmp_path / "params.json").read_text() == (
        '{"dim": 64, "multiple_of": 32, "n_heads": 8, "n_layers": 3, "norm_eps": 1e-06, "vocab_size": -1, '
        '"ffn_dim_multiplier": 0.56}'
    )


def test_names_and_permutation_are_metas(tmp_path):
    write_meta(model(), tmp_path)
    shard, whole = torch.load(tmp_path / "consolidated.00.pth", weights_only=True), tensors()
    layer = "model.layers.1"
    same = {
        "tok_embeddings": "model.embed_tokens",
        "output": "lm_head",
        "norm": "model.norm",
        "layers.1.attention.wv": f"{layer}.self_attn.v_proj",
        "layers.1.attention.wo": f"{layer}.self_attn.o_proj",
        "layers.1.feed_forward.w1": f"{layer}.mlp.gate_proj",
        "layers.1.feed_forward.w2": f"{layer}.mlp.down_proj",
        "layers.1.feed_forward.w3": f"{layer}.mlp.up_proj",
        "layers.1.attention_norm": f"{layer}.input_layernorm",
        "layers.1.ffn_norm": f"{layer}.post_attention_layernorm",
    }
    for meta, ours in same.items():
        assert torch.equal(shard[f"{meta}.weight"], whole[f"{ours}.weight"]), meta
    for x in "qk":
        permuted = whole[f"{layer}.self_attn.{x}_proj.weight"].view(8, 2, 4, 64).transpose(1, 2).reshape(64, 64)
        assert torch.equal(shard[f"layers.1.attention.w{x}.weight"], permuted)
    assert len(shard) == 3 + 9 * 3


def test_buffers_are_dropped_and_llama_3s_row_cut_embedding_is_known(tmp_path):
    write_meta(model(), tmp_path, num_shards=2)
    for i in range(2):
        path = tmp_path / f"consolidated.{i:02d}.pth"
        shard = torch.load(path, weights_only=True)
        shard["rope.freqs"] = torch.ones(4)
        shard["tok_embeddings.weight"] = tensors()["model.embed_tokens.weight"][49 * i : 49 * (i + 1)].clone()
        torch.save(shard, path)
    assert digest(open_checkpoint(tmp_path)) == digest(model())


def test_the_command_finds_size_folder_and_tokenizer(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = make_tokenizer(tmp_path / "llama", CONFIG.vocab_size)
    write_meta(model(), root / "demo", num_shards=2)
    convert_llama_weights_to_hf.main(["--input_dir", str(root), "--model_size", "demo", "--output_dir", str(tmp_path / "hf")])
    assert digest(open_checkpoint(tmp_path / "hf")) == digest(model())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.float16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(root / "tokenizer.model"))
    text = "hello there my friend"
    assert tokenizer(text)["input_ids"] == [1, *pieces.encode(text)]
    arguments = ["--input_dir", str(root / "demo"), "--model_size", "7B", "--output_dir", str(tmp_path / "bin")]
    convert_llama_weights_to_hf.main([*arguments, "--safe_serialization", "false", "--max_shard_size", "50KB"])
    assert digest(open_checkpoint(tmp_path / "bin")) == digest(model())
    assert len(list((tmp_path / "bin").glob("pytorch_model-*.bin"))) > 1


@pytest.fixture
def folder(tmp_path):
    write_meta(model(), tmp_path / "meta", num_shards=4)
    return tmp_path / "meta"


def refused(folder, match):
    before = snapshot(folder.parent)
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        convert_llama_weights_to_hf.main(["--input_dir", str(folder), "--output_dir", str(folder.parent / "out")])
    assert snapshot(folder.parent) == before


def edit(path, change):
    shard = torch.load(path, weights_only=True)
    change(shard)
    torch.save(shard, path)


def test_a_hole_in_the_numbering_is_named(folder):
    (folder / "consolidated.01.pth").unlink()
    refused(folder, r"consolidated.01.pth: not found, but consolidated.03.pth is there")


def test_too_few_shards_are_counted(folder):
    (folder / "consolidated.02.pth").unlink()
    (folder / "consolidated.03.pth").unlink()
    refused(folder, r"2 shards with 32 rows of attention.wq found, params.json expects 64 rows, 4 shards")


def test_no_shards_at_all_are_named(folder):
    for file in folder.glob("*.pth"):
        file.unlink()
    refused(folder, "consolidated.00.pth: not found, but params.json is there")


def test_a_truncated_shard_is_named(folder):
    path = folder / "consolidated.02.pth"
    path.write_bytes(path.read_bytes()[:20000])
    refused(folder, "consolidated.02.pth: is truncated")


def test_something_else_than_a_shard_is_named(folder):
    path = folder / "consolidated.02.pth"
    path.write_text("<html>not found</html>")
    refused(folder, "consolidated.02.pth: is an HTML page")
    path.write_bytes(b"\x00" * 1000)
    refused(folder, "consolidated.02.pth: can't be read as tensors")
    torch.save([1, 2], path)
    refused(folder, "consolidated.02.pth: holds a list")


def test_an_unknown_and_a_missing_tensor_are_named(folder):
    edit(folder / "consolidated.01.pth", lambda shard: shard.update({"layers.0.attention.wx.weight": torch.ones(2)}))
    refused(folder, "consolidated.01.pth: layers.0.attention.wx.weight is in no LLaMA model")
    edit(
        folder / "consolidated.01.pth",
        lambda shard: (shard.pop("layers.0.attention.wx.weight"), shard.pop("layers.1.ffn_norm.weight")),
    )
    refused(folder, "consolidated.01.pth: layers.1.ffn_norm.weight missing")


def test_shards_of_two_models_are_not_mixed(folder):
    edit(folder / "consolidated.03.pth", lambda shard: shard["layers.1.ffn_norm.weight"].add_(1))
    refused(folder, "consolidated.03.pth: layers.1.ffn_norm.weight differs .* different models")


def test_a_params_json_of_another_model_is_named(folder):
    fields = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**fields, "dim": 128}))
    refused(folder, "128 rows, 8 shards")
    (folder / "params.json").write_text("{}")
    refused(folder, "params.json: dim, n_heads, n_layers missing")
    (folder / "params.json").unlink()
    refused(folder, "params.json: not found")


def test_what_the_format_cannot_hold_is_refused_before_writing(tmp_path):
    scaled = replace(CONFIG, rope_scaling={"rope_type": "linear", "factor": 2.0})
    for config, shards, match in (
        (scaled, 1, "no words for its rope scaling"),
        (replace(CONFIG, head_dim=16), 1, "head_dim 16"),
        (CONFIG, 3, "8 heads"),
    ):
        source = make_hf(tmp_path / match.replace(" ", "-"), model(config))
        before = snapshot(tmp_path)
        with pytest.raises(ValueError, match=match):
            convert(source, tmp_path / "out", "meta", num_shards=shards)
        assert snapshot(tmp_path) == before


LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("tie", [False, True])
def test_llama_3_keeps_its_rope_its_positions_and_its_tied_head(shards, tie, tmp_path):
    config = replace(
        CONFIG,
        num_kv_heads=2,
        rope_theta=500000.0,
        rope_scaling=LLAMA31,
        max_positions=131072,
        tie_embeddings=tie,
        norm_eps=1e-5,
    )
    source = make_hf(tmp_path / "hf", model(config))
    convert(source, tmp_path / "meta", "meta", num_shards=shards)
    convert(tmp_path / "meta", tmp_path / "back", "hf")
    held = [torch.load(f, weights_only=True) for f in sorted((tmp_path / "meta").glob("*.pth"))]
    rows = [shard["tok_embeddings.weight"].shape for shard in held]
    assert sum(shape[0] for shape in rows) == config.vocab_size and {shape[1] for shape in rows} == {config.hidden_size}
    assert open_checkpoint(tmp_path / "back").config == config
    assert digest(open_checkpoint(tmp_path / "back")) == digest(open_checkpoint(source))


def test_a_head_that_is_not_tied_although_params_json_says_so(tmp_path):
    write_meta(model(replace(CONFIG, tie_embeddings=True)), tmp_path / "meta")
    shard = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    shard["output.weight"] = shard["output.weight"] + 1
    torch.save(shard, tmp_path / "meta" / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"output\.weight is not tok_embeddings\.weight"):
        open_checkpoint(tmp_path / "meta")
