"""Files against the published hashes: recognised, refused, or honestly undecided."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import asdict

import pytest
from checkpoint_makers import make_adapter, make_hf, model

from pyalpaca import cli
from pyalpaca.checkpoint import Published, digest, open_checkpoint, published, verify, write_meta

MODULE = importlib.import_module("pyalpaca.checkpoint.verify")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def status(capsys, *arguments):
    """(exit status of the command line, its stdout, its stderr)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: cli.main([str(a) for a in arguments]))
    return (end.value.code, *capsys.readouterr())


def as_torch_1_13(path):
    """Rewrite what torch.save wrote without the records that torch 1.13 did not know."""
    with zipfile.ZipFile(path) as archive:
        kept = {n: archive.read(n) for n in archive.namelist() if re.search(r"/(data\.pkl|data/\d+|version)$", n)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in kept.items():
            archive.writestr(name, data)


@pytest.fixture
def shards(tmp_path):
    write_meta(model(), tmp_path / "pth", num_shards=2)
    return tmp_path / "pth"


@pytest.fixture
def table(monkeypatch, tmp_path, shards):
    """Published are: the two shards of `shards`, called Tiny-13B, a tokenizer of theirs, an adapter and another model."""
    (shards / "tokenizer.model").write_bytes(b"the pieces of Tiny")
    adapter = make_adapter(tmp_path / "adapter")
    rows = [
        Published("Tiny-13B", "consolidated.00.pth", sha256(shards / "consolidated.00.pth"), "base-pth"),
        Published("Tiny-13B", "consolidated.01.pth", sha256(shards / "consolidated.01.pth"), "base-pth"),
        Published("Tiny", "tokenizer.model", sha256(shards / "tokenizer.model"), "tokenizer"),
        Published("Tiny-Plus-7B", "adapter_model.bin", sha256(adapter / "adapter_model.bin"), "lora"),
        Published("Other", "tokenizer.model", "0" * 64, "tokenizer"),
        Published("Other-7B", "consolidated.00.pth", "1" * 64, "merged-pth"),
        Published("Other-Pro-7B", "consolidated.*.pth", "TBA", "merged-pth"),
    ]
    monkeypatch.setattr(MODULE, "published", lambda: tuple(rows))
    return rows


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
        "OK        consolidated.00.pth: Tiny-13B consolidated.00.pth (base-pth)",
        "OK        consolidated.01.pth: Tiny-13B consolidated.01.pth (base-pth)",
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
    assert "MISMATCH  consolidated.01.pth: expected Tiny-13B consolidated.01.pth (base-pth) with the sha256" in out
    assert table[1].sha256 in out
    assert f"sha256 {sha256(shards / 'consolidated.01.pth')}" in out


def test_the_model_that_is_asked_for_says_what_is_expected(table, shards):
    table[0] = Published("Tiny-13B", "consolidated.00.pth", "2" * 64, "base-pth")
    report = verify(shards / "consolidated.00.pth", "Tiny-13B")
    assert report.verdicts[0].expected == table[0] and report.mismatched


def test_a_published_file_of_another_model_than_asked(table, shards):
    report = verify(shards, "Other-7B")
    assert set(verdicts(report).values()) == {"MISMATCH"}
    assert report.verdicts[0].reason == "is Tiny-13B consolidated.00.pth (base-pth), expected that of Other-7B"


def test_shards_that_changed_names(table, shards):
    (shards / "consolidated.00.pth").rename(shards / "x")
    (shards / "consolidated.01.pth").rename(shards / "consolidated.00.pth")
    (shards / "x").rename(shards / "consolidated.01.pth")
    report = verify(shards)
    assert verdicts(report)["consolidated.00.pth"] == "MISMATCH"
    assert "is Tiny-13B consolidated.01.pth (base-pth) under another name" in report.verdicts[0].reason


def test_a_missing_shard_and_shards_of_two_models(table, shards, capsys):
    table[1] = Published("Other-13B", "consolidated.01.pth", table[1].sha256, "base-pth")
    assert verify(shards).problems == ("the files are of several models: Other-13B, Tiny-13B",)
    table[1] = Published("Tiny-13B", "consolidated.01.pth", table[1].sha256, "base-pth")
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


def test_the_same_weights_in_another_container_have_the_same_digest(table, shards, capsys):
    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        as_torch_1_13(shards / name)
    code, out, _ = status(capsys, "verify", shards, "--model", "Tiny-13B")
    assert code == 1
    assert "container: folder consolidated.00/ with the records version 3; written by torch 1.6 to 2.0" in out
    assert "the hash can't\ndecide" in out and f"digest {digest(model())}\n" in out


def test_the_container_of_a_newer_torch_is_told(shards, capsys):
    code, out, _ = status(capsys, "verify", shards, "--model", "chinese-alpaca-plus-13B")
    assert code == 1 and out.count("MISMATCH") == 2
    assert "byteorder little" in out and ".data/serialization_id" in out and "version 3; written by torch 2.1 or newer" in out
    assert f"digest {digest(open_checkpoint(shards))}\n" in out


def test_no_digest_without_the_rest_of_the_model(shards, capsys):
    (shards / "params.json").unlink()
    code, out, _ = status(capsys, "verify", shards)
    assert code == 1 and "No content digest: " in out and "params.json: not found" in out


def test_files_that_are_no_weights(table, shards, capsys):
    whole = (shards / "consolidated.00.pth").read_bytes()
    damages = {
        whole[: len(whole) // 2]: "is truncated, damaged or",
        whole[:4]: "is truncated, damaged or",
        whole.replace(b"data.pkl", b"data.plk"): "is truncated, damaged or not written by torch.save",
        b"": "is empty",
        b"<!DOCTYPE html>": "is an HTML page",
        b"version https://git-lfs.github.com/spec/v1\n": "is a Git LFS pointer",
    }
    for data, said in damages.items():
        (shards / "consolidated.00.pth").write_bytes(data)
        code, out, err = status(capsys, "verify", shards)
        assert (code, err) == (1, "")
        assert f"MISMATCH  consolidated.00.pth: {said}" in out and "digest" not in out
    (shards / "consolidated.00.pth").write_bytes(b"\x80\x02 an old pickle")
    assert "it is no zip archive" in verify(shards).verdicts[0].reason


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
    assert said["files"][1]["container"]["writer"] == "torch 2.1 or newer"
    assert said["digest"] or said["digest_error"]


def test_bad_input_is_status_2(tmp_path, shards, capsys):
    for arguments, said in (
        ([tmp_path / "nowhere"], "nowhere: not found"),
        ([tmp_path], "no weight or tokenizer file in it (it holds pth)"),
        ([shards, "--model", "chinese-alpaka-7b"], "not in the table of published hashes; it has Chinese-Alpaca-7B"),
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
