"""The native layout: any rank layout writes, any other reads; damage is named."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import replace

import pytest
import torch
from checkpoint_makers import CONFIG, make_tokenizer, model, tensors

from pyalpaca.checkpoint import (
    DamagedError,
    digest,
    native_steps,
    native_tensors,
    open_checkpoint,
    read_native_meta,
    write_latest,
    write_native,
    write_native_manifest,
    write_native_shard,
)
from pyalpaca.model import lora_parameters, parameters, shard, stage_parameters, whole_slice


def write_run(run, tp=2, pp=2, step=10):
    """What tp x pp ranks write: the weights, and the optimizer's moments cut once more along dimension 1."""
    folder, whole, entries = run / f"step_{step:07d}", tensors(), []
    folder.mkdir(parents=True)
    for stage in range(pp):
        for rank in range(tp):
            mine, moments = {}, {}
            for p in stage_parameters(parameters(CONFIG), CONFIG.num_layers, stage, pp):
                piece = shard(p, rank, tp)
                if piece is None and rank > 0:
                    continue  # the first rank owns what all hold
                tensor = whole_slice(whole[p.name], piece)
                mine[p.name] = (tensor, p.shape, piece)
                if len(p.shape) == 2 and p.dim == 0:
                    half = (1, 0, p.shape[1] // 2), (1, p.shape[1] // 2, p.shape[1])
                    for i, columns in enumerate(half):
                        moments.setdefault(i, {})[f"exp_avg.{p.name}"] = (
                            whole_slice(tensor, columns).float() * 2,
                            p.shape,
                            [piece, columns] if piece else columns,
                        )
            entries += write_native_shard(folder, f"tp{rank:02d}_pp{stage:02d}", mine, "model")
            for i, owned in moments.items():
                entries += write_native_shard(folder, f"tp{rank:02d}_pp{stage:02d}_dp{i}", owned, "optimizer")
    step_count = {"step": (torch.tensor(step), (), None)}
    entries += write_native_shard(folder, "common", step_count, "optimizer")
    write_native_manifest(folder, CONFIG, entries, {"step": step, "scale": 65536.0, "order": [1, 2]})
    write_latest(run, folder.name)
    return folder


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (4, 3)])
def test_what_ranks_write_is_read_whole_and_in_pieces(tmp_path, tp, pp):
    folder = write_run(tmp_path, tp, pp)
    reader = open_checkpoint(folder)
    assert reader.layout == "native"
    assert reader.config == CONFIG
    assert digest(reader) == digest(model())
    fresh = open_checkpoint(folder)
    for name, tensor in tensors().items():
        for dim in range(tensor.dim()):
            start, stop = tensor.shape[dim] // 3, tensor.shape[dim] // 2 + 3
            assert torch.equal(fresh.read(name, (dim, start, stop)), tensor.narrow(dim, start, stop - start)), name


def test_the_optimizer_is_read_by_the_same_names_in_any_box(tmp_path):
    optimizer = native_tensors(write_run(tmp_path), "optimizer")
    name = "model.layers.2.mlp.up_proj.weight"
    whole = tensors()[name].float() * 2
    assert torch.equal(optimizer.read(f"exp_avg.{name}", None), whole)
    assert torch.equal(optimizer.read(f"exp_avg.{name}", (0, 10, 60)), whole[10:60])
    assert torch.equal(optimizer.read(f"exp_avg.{name}", [(0, 10, 60), (1, 20, 50)]), whole[10:60, 20:50])
    assert optimizer.read("step", None) == torch.tensor(10)
    assert optimizer.shapes["step"] == ()


def test_a_run_folder_opens_its_latest_step_and_finds_its_tokenizer(tmp_path):
    make_tokenizer(tmp_path, CONFIG.vocab_size)
    write_run(tmp_path, step=10)
    write_run(tmp_path, step=20)
    reader = open_checkpoint(tmp_path)
    assert reader.path.name == "step_0000020"
    assert reader.tokenizer == tmp_path
    assert read_native_meta(tmp_path) == {"step": 20, "scale": 65536.0, "order": [1, 2]}


def test_any_reader_becomes_a_native_checkpoint(tmp_path):
    config = replace(CONFIG, tie_embeddings=True, rope_scaling={"rope_type": "linear", "factor": 2.0})
    write_native(model(config), tmp_path / "n", {"step": 0})
    reader = open_checkpoint(tmp_path / "n")
    assert reader.config == config
    assert digest(reader) == digest(model(config))


def test_lora_factors_are_merged_as_the_forward_pass_applies_them(tmp_path):
    config = replace(CONFIG, lora_scale=2.0)
    whole = tensors(dtype=torch.float32)
    factors = {p.name: torch.randn(p.shape) for p in lora_parameters(parameters(CONFIG), 4, ["q_proj"])}
    held = {name: (tensor, tuple(tensor.shape), None) for name, tensor in (whole | factors).items()}
    write_native_manifest(tmp_path, config, write_native_shard(tmp_path, "all", held, "model"), {})
    reader = open_checkpoint(tmp_path)
    stem = "model.layers.0.self_attn.q_proj"
    expected = whole[f"{stem}.weight"] + factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"] * 2
    assert reader.names == list(whole)
    torch.testing.assert_close(reader.read(f"{stem}.weight"), expected)
    assert torch.equal(reader.read(f"{stem}.weight", (1, 8, 16)), reader.read(f"{stem}.weight")[:, 8:16])
    assert torch.equal(native_tensors(tmp_path, "model").read(f"{stem}.lora_A.weight", None), factors[f"{stem}.lora_A.weight"])


def test_a_missing_shard_is_named(tmp_path):
    folder = write_run(tmp_path)
    (folder / "model-tp01_pp00.safetensors").unlink()
    with pytest.raises(DamagedError, match=r"model-tp01_pp00.safetensors: not found, but manifest.json names it"):
        open_checkpoint(tmp_path)


def test_a_truncated_shard_is_named(tmp_path):
    path = write_run(tmp_path) / "model-tp01_pp00.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model-tp01_pp00.safetensors: can't be read as safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("piece", [None, (0, 50, 60), (1, 0, 3)])
def test_a_flipped_bit_is_named(tmp_path, piece):
    path = write_run(tmp_path) / "model-tp01_pp00.safetensors"
    data = bytearray(path.read_bytes())
    name = "model.embed_tokens.weight"
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    data[8 + int.from_bytes(data[:8], "little") + header[name]["data_offsets"][0] + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"model-tp01_pp00.safetensors: {name} has another checksum"):
        open_checkpoint(tmp_path).read(name, piece)


def test_pieces_that_leave_a_hole_or_overlap_are_refused(tmp_path):
    folder = write_run(tmp_path)
    fields = json.loads((folder / "manifest.json").read_text())
    entry = next(e for e in fields["tensors"] if e["name"] == "lm_head.weight" and e["start"][0] == 0)
    for start, match in ((1, "overlap"), (None, "the pieces of lm_head.weight hold 3136 of 6208 elements")):
        changed = [
            e if e is not entry else {**e, "start": [start, 0]} for e in fields["tensors"] if not (e is entry and start is None)
        ]
        (folder / "manifest.json").write_text(json.dumps({**fields, "version": 1, "tensors": changed}))
        with pytest.raises(ValueError, match=match):
            open_checkpoint(folder)


def test_latest_that_names_nothing_is_refused(tmp_path):
    write_run(tmp_path)
    write_latest(tmp_path, "step_0000099")
    match = r"step_0000099/manifest.json: not found, but .*latest names it; use .*step_0000010, the last good checkpoint"
    with pytest.raises(DamagedError, match=match):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("written", ["", "step_", "\0\0", "stfp_0000010"])
def test_a_latest_that_is_damaged_is_named_with_the_newest_step(tmp_path, written):
    write_run(tmp_path, step=9)
    write_run(tmp_path, step=10)
    (tmp_path / "latest").write_text(written)
    match = r"latest: does not name a step of this run; use .*step_0000010, the last good checkpoint"
    with pytest.raises(DamagedError, match=match):
        open_checkpoint(tmp_path)


def test_the_last_good_step_is_named_whatever_lies_between(tmp_path):
    for step in (10, 20, 30, 40):
        write_run(tmp_path, step=step)
    (tmp_path / "step_0000030" / "manifest.json").unlink()
    shard = tmp_path / "step_0000020" / "optimizer-common.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    damage(tmp_path / "step_0000040" / "manifest.json", -30)
    match = r"step_0000040/manifest.json: has another checksum than it says.*; use .*step_0000010, the last good checkpoint"
    with pytest.raises(DamagedError, match=match):
        open_checkpoint(tmp_path)
    (tmp_path / "step_0000010" / "manifest.json").unlink()
    with pytest.raises(DamagedError, match=rf"; no earlier checkpoint in {re.escape(str(tmp_path))} is whole"):
        open_checkpoint(tmp_path)


def damage(path, place, bit=1):
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def test_no_bit_of_a_manifest_can_flip_unnoticed(tmp_path):
    path = write_run(tmp_path, tp=1, pp=1) / "manifest.json"
    whole, meta = path.read_bytes(), read_native_meta(tmp_path)
    for place in [*range(0, 400), *range(400, len(whole), 97), *range(len(whole) - 60, len(whole))]:
        damage(path, place, 1 << place % 8)
        try:
            assert (read_native_meta(tmp_path), place) == (meta, len(whole) - 1)  # the line's end may be any white space
        except DamagedError as error:
            assert str(error).startswith(f"{path}: ")
        path.write_bytes(whole)
    fields = json.loads(whole)
    assert fields["crc32"] == zlib.crc32(whole[: whole.rindex(b', "crc32"')])


def test_a_manifest_of_the_first_version_had_no_checksum(tmp_path):
    path = write_run(tmp_path) / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["crc32"]
    path.write_text(json.dumps({**fields, "version": 1}))
    assert digest(open_checkpoint(tmp_path)) == digest(model())
    path.write_text(json.dumps(fields))
    with pytest.raises(DamagedError, match="another checksum"):
        open_checkpoint(tmp_path)


def test_a_step_that_latest_does_not_name_yet_is_no_choice(tmp_path):
    first, second = write_run(tmp_path, step=10), write_run(tmp_path, step=20)
    write_latest(tmp_path, first.name)
    assert native_steps(tmp_path) == [first]
    (tmp_path / "latest").unlink()
    assert native_steps(tmp_path) == [second, first]
