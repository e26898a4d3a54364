"""Files against the published hashes: recognised in any container, refused, or unknown; and weights against a reference."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from checkpoint_makers import CONFIG, make_adapter, make_hf, model, tensors
from safetensors.torch import load_file, save_file

from pyalpaca import cli
from pyalpaca.checkpoint import (
    SIZES,
    Published,
    convert,
    digest,
    memory_reader,
    open_checkpoint,
    published,
    size_by_name,
    verify,
    write_meta,
)

MODULE = importlib.import_module("pyalpaca.checkpoint.verify")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def status(capsys, *arguments):
    """(exit status of the command line, its stdout, its stderr)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: cli.main([str(a) for a in arguments]))
    return (end.value.code, *capsys.readouterr())


@pytest.fixture
def shards(tmp_path):
    """Two shards, as torch 1.13 writes them."""
    write_meta(model(), tmp_path / "pth", num_shards=2, container="torch1.13")
    return tmp_path / "pth"


@pytest.fixture
def table(monkeypatch, tmp_path, shards):
    """Published are: the two shards of `shards`, called Tiny-13B, a tokenizer of theirs, an adapter and another model."""
    (shards / "tokenizer.model").write_bytes(b"the pieces of Tiny")
    adapter = make_adapter(tmp_path / "adapter")
    rows = [
        Published("Tiny-13B", "consolidated.00.pth", sha256(shards / "consolidated.00.pth"), "merged-pth"),
        Published("Tiny-13B", "consolidated.01.pth", sha256(shards / "consolidated.01.pth"), "merged-pth"),
        Published("Tiny", "tokenizer.model", sha256(shards / "tokenizer.model"), "tokenizer"),
        Published("Tiny-Plus-7B", "adapter_model.bin", sha256(adapter / "adapter_model.bin"), "lora"),
        Published("Other", "tokenizer.model", "0" * 64, "tokenizer"),
        Published("Other-7B", "consolidated.00.pth", "1" * 64, "base-pth"),
        Published("Other-Pro-7B", "consolidated.*.pth", "TBA", "merged-pth"),
    ]
    monkeypatch.setattr(MODULE, "published", lambda: tuple(rows))
    for size in ("7B", "13B"):
        monkeypatch.setitem(SIZES, size, replace(SIZES[size], hidden_size=CONFIG.hidden_size))
    return rows


def save_again(path, change=lambda made: None, **how):
    """Load a file and save it with the torch that is here."""
    made = torch.load(path)
    change(made)
    torch.save(made, path, **how)


def verdicts(report):
    return {v.path.name: v.status for v in report.verdicts}


def change(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_the_table_holds_60_hashes_and_4_announced():
    rows = published()
    hashes = [row.sha256 for row in rows if not row.announced]
    assert len(rows) == 64 and len(hashes) == len(set(hashes)) == 60
    assert all(re.fullmatch("[0-9a-f]{64}", h) for h in hashes)
    assert {row.kind for row in rows} == {"base-pth", "base-hf", "tokenizer", "lora", "merged-pth"}


def test_the_real_table_knows_the_tokenizer_of_the_demo(capsys):
    tokenizer = importlib.import_module("pyalpaca.demo").__path__[0] + "/data/llama-tokenizer.model"
    assert status(capsys, "verify", tokenizer)[0] == 1  # LLaMA's own is not in the table
    assert verify(tokenizer).verdicts[0].status == "UNKNOWN"


def test_a_published_folder_is_ok(table, shards, capsys):
    code, out, err = status(capsys, "verify", shards)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "OK        consolidated.00.pth: Tiny-13B consolidated.00.pth (merged-pth)",
        "OK        consolidated.01.pth: Tiny-13B consolidated.01.pth (merged-pth)",
        "OK        tokenizer.model: Tiny tokenizer.model (tokenizer)",
    ]
    assert status(capsys, "verify", shards, "--model", "tiny-13b")[0] == 0


def test_a_published_adapter_under_its_own_name(table, tmp_path):
    (tmp_path / "adapter" / "adapter_model.bin").rename(tmp_path / "tiny-plus.bin")
    report = verify(tmp_path / "tiny-plus.bin", "TINY-PLUS-7B")
    assert report.ok and report.verdicts[0].found.model == "Tiny-Plus-7B"


def test_another_tokenizer_beside_published_weights(table, shards):
    (shards / "tokenizer.model").write_bytes(b"other pieces")
    report = verify(shards)
    assert verdicts(report)["tokenizer.model"] == "MISMATCH"
    assert report.verdicts[2].expected.model == "Tiny" and not report.ok
    table[:] = [row for row in table if row.kind != "tokenizer"]
    assert verdicts(verify(shards))["tokenizer.model"] == "UNKNOWN"
    assert verify(shards).ok


def test_what_the_others_are_says_what_a_changed_shard_should_be(table, shards, capsys):
    change(shards / "consolidated.01.pth")
    code, out, _ = status(capsys, "verify", shards)
    assert code == 1
    assert "MISMATCH  consolidated.01.pth: expected Tiny-13B consolidated.01.pth (merged-pth) with the sha256" in out
    assert table[1].sha256 in out
    assert f"sha256 {sha256(shards / 'consolidated.01.pth')}" in out


def test_the_model_that_is_asked_for_says_what_is_expected(table, shards):
    table[0] = Published("Tiny-13B", "consolidated.00.pth", "2" * 64, "base-pth")
    report = verify(shards / "consolidated.00.pth", "Tiny-13B")
    assert report.verdicts[0].expected == table[0] and report.mismatched


def test_a_published_file_of_another_model_than_asked(table, shards):
    report = verify(shards, "Other-7B")
    assert set(verdicts(report).values()) == {"MISMATCH"}
    assert report.verdicts[0].reason == "is Tiny-13B consolidated.00.pth (merged-pth), expected that of Other-7B"


def test_shards_that_changed_names(table, shards):
    (shards / "consolidated.00.pth").rename(shards / "x")
    (shards / "consolidated.01.pth").rename(shards / "consolidated.00.pth")
    (shards / "x").rename(shards / "consolidated.01.pth")
    report = verify(shards)
    assert verdicts(report)["consolidated.00.pth"] == "MISMATCH"
    assert "is Tiny-13B consolidated.01.pth (merged-pth) under another name" in report.verdicts[0].reason


def test_a_missing_shard_and_shards_of_two_models(table, shards, capsys):
    table[1] = Published("Other-13B", "consolidated.01.pth", table[1].sha256, "merged-pth")
    assert verify(shards).problems == ("the files are of several models: Other-13B, Tiny-13B",)
    table[1] = Published("Tiny-13B", "consolidated.01.pth", table[1].sha256, "merged-pth")
    (shards / "consolidated.01.pth").unlink()
    code, out, _ = status(capsys, "verify", shards)
    assert code == 1 and "MISMATCH  consolidated.01.pth of Tiny-13B is missing" in out


def test_several_models_left_are_not_guessed_among(table, shards):
    change(shards / "consolidated.00.pth")
    verdict = verify(shards / "consolidated.00.pth").verdicts[0]
    assert verdict.status == "UNKNOWN"
    assert "has consolidated.00.pth of 3 models: --model NAME" in verdict.reason
    assert "those of Other-Pro-7B were announced (TBA) and never published" in verdict.reason


def test_a_hash_that_was_never_published(table, shards):
    report = verify(shards / "consolidated.00.pth", "other-pro-7b")
    assert report.mismatched  # it is Tiny's
    change(shards / "consolidated.00.pth")
    report = verify(shards / "consolidated.00.pth", "other-pro-7b")
    assert report.verdicts[0].status == "UNKNOWN" and not report.ok
    assert "that of Other-Pro-7B was announced (TBA) and never published" in report.verdicts[0].reason


@pytest.mark.parametrize(
    "how, writer",
    [({}, "torch 2.7 or newer"), ({"_use_new_zipfile_serialization": False}, "torch before 1.6")],
)
def test_published_weights_that_another_torch_saved_are_ok(table, shards, how, writer, capsys):
    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        save_again(shards / name, **how)
    code, out, err = status(capsys, "verify", shards)
    assert (code, err) == (0, "")
    said = f"(merged-pth) in the container of {writer}: its tensors are those published"
    assert out.splitlines()[:2] == [f"OK        consolidated.0{i}.pth: Tiny-13B consolidated.0{i}.pth {said}" for i in (0, 1)]
    report = verify(shards, "Tiny-13B")
    assert report.ok and [v.found for v in report.verdicts] == table[:3] and report.verdicts[0].sha256 != table[0].sha256


@pytest.mark.parametrize("container", ["torch2.1", "torch2.7"])
def test_a_merge_of_ours_in_any_container_is_ok(table, tmp_path, container):
    write_meta(model(), tmp_path / "merged", num_shards=2, container=container)
    assert verify(tmp_path / "merged").ok


def test_weights_saved_again_say_what_the_others_should_be(table, shards):
    save_again(shards / "consolidated.00.pth")
    change(shards / "consolidated.01.pth")
    report = verify(shards)
    assert verdicts(report) == {"consolidated.00.pth": "OK", "consolidated.01.pth": "MISMATCH", "tokenizer.model": "OK"}
    assert report.verdicts[1].expected == table[1]
    assert "is Tiny-13B" in verify(shards, "Other-7B").verdicts[0].reason


def test_weights_saved_again_under_other_names(table, shards, tmp_path):
    made = torch.load(shards / "consolidated.01.pth")
    for name in ("mine.pth", "mine.pt", "mine"):
        torch.save(made, tmp_path / name)
        verdict = verify(tmp_path / name).verdicts[0]
        assert (verdict.status, verdict.found) == ("OK", table[1])
    save_again(shards / "consolidated.01.pth")
    (shards / "consolidated.01.pth").rename(shards / "consolidated.00.pth")
    verdict = verify(shards).verdicts[0]
    assert (verdict.status, verdict.reason) == ("MISMATCH", "is Tiny-13B consolidated.01.pth (merged-pth) under another name")


def test_an_adapter_saved_again(table, tmp_path):
    save_again(tmp_path / "adapter" / "adapter_model.bin")
    assert verify(tmp_path / "adapter", "Tiny-Plus-7B").ok


def test_a_weight_that_differs_is_told_from_another_container(table, shards, capsys):
    save_again(shards / "consolidated.01.pth", lambda made: made["norm.weight"].add_(1))
    code, out, _ = status(capsys, "verify", shards)
    assert code == 1
    assert f"with the sha256 {table[1].sha256}: no torch gives its tensors that sha256, its weights differ from those" in out
    assert "Which tensors differ is said by --reference BASE" in out
    table[1] = replace(table[1], kind="base-pth")
    assert "or those were saved from a GPU or by an older torch" in verify(shards, "Tiny-13B").verdicts[1].reason


def test_other_shapes_than_the_published_are_said(table, shards, capsys):
    table[0] = replace(table[0], model="LLaMA-13B")  # of 32,000 pieces
    save_again(shards / "consolidated.00.pth", lambda made: made.update(extra=torch.ones(1)))
    assert "its weights differ, they have other names or shapes" in verify(shards, "LLaMA-13B").verdicts[0].reason


def test_what_a_file_may_be_is_known_by_its_tensors(monkeypatch):
    size = size_by_name("7B")
    layer = {"model.layers.0.mlp.gate_proj.weight": (size.intermediate_size, size.hidden_size)}
    rows = published()

    def models(shapes):
        return sorted({row.model for row in rows if row.may_hold(shapes)})

    merged = [f"Chinese-{name}-7B" for name in ("Alpaca", "Alpaca-Plus", "Alpaca-Pro")]
    assert models(layer) == ["LLaMA-7B"]
    assert models({**layer, "lm_head.weight": (49954, 4096)}) == []
    assert models({"tok_embeddings.weight": (49954, 4096)}) == merged
    assert models({"tok_embeddings.weight": (49954, 2560), "norm.weight": (5120,)}) == [m.replace("7B", "13B") for m in merged]
    assert models({"base_model.model.model.embed_tokens.weight": (49954, 4096)}) == merged
    assert models({"tok_embeddings.weight": (55296, 4096)}) == models({"x": (4096,)}) == models({"norm.weight": (64,)}) == []


def test_weights_of_no_published_size_are_not_hashed_again(shards, monkeypatch):
    monkeypatch.setattr("pyalpaca.checkpoint.resaved.raw_bytes", None)
    verdict = verify(shards / "consolidated.00.pth").verdicts[0]
    assert verdict.status == "UNKNOWN" and "which has no consolidated.00.pth with such tensors" in verdict.reason
    report = verify(shards, "chinese-alpaca-plus-13B")
    assert [v.status for v in report.verdicts] == ["MISMATCH"] * 2
    assert "they have other names or shapes" in report.verdicts[0].reason


def test_files_that_are_no_weights(table, shards, capsys):
    whole = (shards / "consolidated.00.pth").read_bytes()
    damages = {
        whole[: len(whole) // 2]: "is truncated",
        whole[:4]: "is truncated",
        b"\x80\x02 an old pickle": "its pickle",
        whole.replace(b"data.pkl", b"data.plk"): "is a zip archive without data.pkl",
        b"": "is empty",
        b"<!DOCTYPE html>": "is an HTML page",
        b"version https://git-lfs.github.com/spec/v1\n": "is a Git LFS pointer",
    }
    for data, said in damages.items():
        (shards / "consolidated.00.pth").write_bytes(data)
        code, out, err = status(capsys, "verify", shards)
        assert (code, err) == (1, "")
        assert f"MISMATCH  consolidated.00.pth: {said}" in out and "--reference" not in out
    torch.save([torch.ones(2)], shards / "consolidated.00.pth")
    assert verify(shards).verdicts[0].reason.startswith("holds a list, expected a dict of tensors")


def test_what_a_trainer_writes_beside_the_weights_is_not_looked_at(table, shards):
    for name in ("training_args.bin", "optimizer.bin", "scheduler.bin"):
        torch.save(object, shards / name)
    assert verify(shards).ok


def as_hf(folder, change):
    """The model of `shards` in Hugging Face's layout, its tensors changed."""
    path = make_hf(folder) / "model.safetensors"
    made = load_file(path)
    change(made)
    save_file(made, path, {"format": "pt"})
    return folder


def test_a_reference_in_another_layout_says_that_the_weights_are_the_same(table, shards, tmp_path, capsys):
    table[:] = [row for row in table if row.kind == "tokenizer"]
    assert status(capsys, "verify", shards)[0] == 1  # nothing is known of the weights
    code, out, err = status(capsys, "verify", shards, "--reference", make_hf(tmp_path / "hf"))
    assert (code, err) == (0, "")
    assert f"OK        the weights, 30 tensors, are byte for byte those of {tmp_path / 'hf'}\n" in out
    assert f"digest {digest(model())}\n" in out
    shard = shards / "consolidated.01.pth"
    assert status(capsys, "verify", shard, "--reference", tmp_path / "hf")[0] == 0  # its folder is compared
    change(shard)
    assert status(capsys, "verify", shard, "--reference", tmp_path / "hf")[0] == 1


def test_a_reference_that_is_a_merge_made_anew(table, tmp_path, road, capsys):
    lora = [road.plus, road.alpaca]
    convert(road.base, tmp_path / "merged", "meta", lora=lora)
    names = ",".join(map(str, lora))
    code, out, _ = status(capsys, "verify", tmp_path / "merged", "--reference", road.base, "--reference-lora", names)
    assert code == 0 and f"are byte for byte those of {road.base} + {road.plus} + {road.alpaca}\n" in out
    code, out, _ = status(capsys, "verify", tmp_path / "merged", "--reference", road.base, "--reference-lora", road.plus)
    assert code == 1 and "model.embed_tokens.weight: shape 154 x 64 in A, 153 x 64 in B\n" in out


def test_a_reference_does_not_excuse_what_is_published_otherwise(table, shards, tmp_path):
    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        save_again(shards / name, lambda made: made["norm.weight"].add_(1))
    changed = as_hf(tmp_path / "hf", lambda made: made["model.norm.weight"].add_(1))
    report = verify(shards, "Tiny-13B", open_checkpoint(changed))
    assert report.comparison.differing == () and not report.ok


def test_the_tensors_that_differ_from_a_reference_are_named(table, shards, tmp_path, capsys):
    def change(made):
        made["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.25
        made["model.layers.2.self_attn.q_proj.weight"][0, 0] *= -1
        made["model.norm.weight"] = made["model.norm.weight"].float()

    first = tensors()["model.layers.2.self_attn.q_proj.weight"][0, 0]
    code, out, err = status(capsys, "verify", shards, "--reference", as_hf(tmp_path / "hf", change))
    assert (code, err) == (1, "")
    *ok, head, up, q, norm = out.splitlines()
    assert [line[:10] for line in ok] == ["OK        "] * 3
    assert head == f"MISMATCH  3 of 30 tensors differ, A is what is verified, B is {tmp_path / 'hf'}"
    assert re.fullmatch(r" {10}model.layers.1.mlp.up_proj.weight: 1 of 6144 values, max abs difference 2\.50.e-01", up)
    assert q.strip() == f"model.layers.2.self_attn.q_proj.weight: 1 of 4096 values, max abs difference {2 * abs(first):.3e}"
    assert norm.strip() == "model.norm.weight: dtype float16 in A, float32 in B, max abs difference 0.000e+00"


def test_numbers_that_are_equal_in_other_bytes_differ(table, shards, tmp_path):
    zero = tensors()
    zero["model.norm.weight"][0] = 0.0
    write_meta(memory_reader(CONFIG, zero), tmp_path / "zero", num_shards=2)
    minus = as_hf(tmp_path / "hf", lambda made: made["model.norm.weight"].__setitem__(0, -0.0))
    [entry] = verify(tmp_path / "zero", reference=open_checkpoint(minus)).comparison.differing
    assert (entry.name, entry.reason) == ("model.norm.weight", "equal as numbers, other bytes (0 and -0, or NaN)")


def test_ten_tensors_are_named_and_the_rest_counted(table, shards, tmp_path, capsys):
    other = as_hf(tmp_path / "hf", lambda made: [t.add_(1) for t in made.values()])
    code, out, _ = status(capsys, "verify", shards, "--reference", other)
    assert code == 1 and out.count("max abs difference 1.") == 10
    assert out.splitlines()[-1].strip() == "and 20 more"


def test_json(table, shards, tmp_path, capsys):
    code, out, _ = status(capsys, "verify", shards, "--json")
    said = json.loads(out)
    assert code == 0 and said["ok"] and [f["status"] for f in said["files"]] == ["OK"] * 3
    assert said["files"][0]["found"] == asdict(table[0])
    change(shards / "consolidated.01.pth")
    code, out, _ = status(capsys, "verify", shards, "--json")
    said = json.loads(out)
    assert code == 1 and not said["ok"]
    assert said["files"][1]["expected"]["sha256"] == table[1].sha256
    assert said["files"][1]["container"] == {"form": "torch1.13", "folder": "consolidated.01"}
    assert said["reference"] is None
    code, out, _ = status(capsys, "verify", shards, "--json", "--reference", make_hf(tmp_path / "hf"))
    said = json.loads(out)["reference"]
    assert code == 1 and (said["reference"], said["tensors"], len(said["differing"])) == (str(tmp_path / "hf"), 30, 1)
    assert said["digest"] != said["reference_digest"] == digest(model())
    assert said["differing"][0].keys() == {"tensor", "reason", "max_difference"}


def test_bad_input_is_status_2(tmp_path, shards, capsys):
    bare = tmp_path / "pth" / "bare" / "adapter.pth"
    bare.parent.mkdir()
    torch.save({}, bare)
    for arguments, said in (
        ([tmp_path / "nowhere"], "nowhere: not found"),
        ([tmp_path], "no weight or tokenizer file in it (it holds pth)"),
        ([shards, "--model", "chinese-alpaka-7b"], "not in the table of published hashes; it has Chinese-Alpaca-7B"),
        ([shards, "--reference", tmp_path / "nowhere"], "nowhere: not found, expected a checkpoint folder"),
        ([shards, "--reference-lora", "a,b"], "--reference-lora: no --reference was given"),
        ([bare, "--reference", shards], "bare: no checkpoint recognised (it holds adapter.pth)"),
    ):
        code, out, err = status(capsys, "verify", *arguments)
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_metas_name_of_the_33b_is_known(shards):
    assert verify(shards / "consolidated.01.pth", "llama-30b").verdicts[0].expected.model == "LLaMA-33B"


def test_a_tokenizer_narrows_what_weights_can_be(table, tmp_path, shards):
    hf = make_hf(tmp_path / "hf", weights="bin")
    table.append(Published("Other-7B", "pytorch_model.bin", "3" * 64, "base-hf"))
    assert verdicts(verify(hf)) == {"pytorch_model.bin": "MISMATCH"}
    (hf / "tokenizer.model").write_bytes((shards / "tokenizer.model").read_bytes())
    assert verdicts(verify(hf)) == {"pytorch_model.bin": "UNKNOWN", "tokenizer.model": "OK"}


def test_help_answers_without_torch():
    for name in ("verify", "diff"):
        call = f"from pyalpaca.commands.{name} import main\ntry: main(['--help'])"
        code = f"import sys; {call}\nfinally: assert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "example: pyalpaca" in done.stdout
