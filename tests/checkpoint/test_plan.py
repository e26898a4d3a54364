"""The engine that carries out a plan: every tensor in its place, or nothing at all; and what it says beforehand."""

from __future__ import annotations

import os
import re
import signal
import threading
from dataclasses import replace

import pytest
import torch
from checkpoint_makers import CONFIG, make_hf, model, snapshot, tensors

from pyalpaca import cli
from pyalpaca.checkpoint import Output, describe, digest, execute, memory_reader, open_checkpoint, plan_conversion
from pyalpaca.checkpoint import plan as engine
from pyalpaca.checkpoint.container.torch_layout import CONTAINERS
from pyalpaca.checkpoint.convert import LAYOUTS

FOLDERS = [layout for layout in LAYOUTS if layout != "gguf"]


@pytest.mark.parametrize("layout", FOLDERS)
def test_steps_fill_every_place_once_and_read_every_tensor(layout, tmp_path):
    plan = plan_conversion(model(), Output(layout))
    read = [name for step in plan.steps for name in step.names]
    assert set(read) == set(plan.reader.names)
    made = [(file, key) for step in plan.steps for file, key, _ in step.make({n: plan.reader.read(n) for n in step.names})]
    assert sorted(made) == sorted((file.name, key) for file in plan.files for key in file.specs)


@pytest.mark.parametrize("layout", FOLDERS)
def test_what_is_written_is_what_was_planned(layout, tmp_path):
    plan = plan_conversion(model(), Output(layout))
    execute(plan, tmp_path / "out")
    written = {f.relative_to(tmp_path / "out").as_posix(): f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert set(written) == {*(file.name for file in plan.files), *plan.small}
    assert all(written[file.name] == file.size for file in plan.files)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("layout", ["hf", "meta", "megatron", "deepspeed"])
def test_any_container_holds_the_same_weights(layout, container, tmp_path):
    weights = {"weights": "bin"} if layout == "hf" else {}
    execute(plan_conversion(model(), Output(layout, container=container, **weights)), tmp_path / "out")
    assert digest(open_checkpoint(tmp_path / "out")) == digest(model())


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--to", "hf", "--tp", "4"], "tp 4 is for megatron, deepspeed"),
        (["--to", "meta", "--weights", "bin"], "weights bin is for hf"),
        (["--to", "native", "--num-shards", "2"], "num shards 2 is for meta"),
        (["--to", "gguf", "--container", "torch1.13"], "container torch1.13 is for hf, meta, megatron, deepspeed"),
        (["--to", "hf", "--container", "torch1.13"], "container torch1.13 is for files of torch.save"),
    ],
)
def test_a_flag_that_would_have_no_effect_is_refused(flags, what, tmp_path):
    source = make_hf(tmp_path / "m")
    with pytest.raises(ValueError, match=what):
        cli.main(["convert", str(source), str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_the_installed_torch_would_have_written_the_same_bytes(tmp_path):
    held = tensors()
    execute(plan_conversion(model(), Output("hf", weights="bin")), tmp_path / "out")
    torch.save(held, tmp_path / "pytorch_model.bin")
    assert (tmp_path / "out" / "pytorch_model.bin").read_bytes() == (tmp_path / "pytorch_model.bin").read_bytes()


def test_zeros_pad_the_vocabulary_when_asked(tmp_path):
    plan = plan_conversion(model(), Output("megatron", tp=2, padding="zero"))
    execute(plan, tmp_path / "out")
    last = torch.load(tmp_path / "out" / "release" / "mp_rank_01" / "model_optim_rng.pt", weights_only=True)["model"]
    rows = last["embedding.word_embeddings.weight"]
    assert rows.shape[0] == 128 and not rows.any()  # 97 rows are all on the first of two ranks of 128
    assert digest(open_checkpoint(tmp_path / "out")) == digest(model())


def test_a_step_that_fails_leaves_the_old_result(tmp_path):
    make_hf(tmp_path / "out")
    before = snapshot(tmp_path)
    broken = replace(model(), fetch=lambda name, piece: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        execute(plan_conversion(broken, Output("hf")), tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_ctrl_c_ends_it_and_leaves_nothing(tmp_path):
    source = model()

    def fetch(name, piece):
        if name == "model.norm.weight":
            os.kill(os.getpid(), signal.SIGINT)
        return source.read(name)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        execute(plan_conversion(replace(source, fetch=fetch), Output("hf")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_tensors_in_flight_stay_within_the_limit(tmp_path, monkeypatch):
    """However many workers there are, tensors of at most the limit are held, or one alone that is larger."""
    held, most, lock = 0, 0, threading.Lock()
    source = model()

    def fetch(name, piece):
        nonlocal held, most
        with lock:
            held += source.read(name).nbytes
            most = max(most, held)
        return source.read(name)

    def made(step):
        def make(read):
            nonlocal held
            yield from step.make(read)
            with lock:
                held -= sum(t.nbytes for t in read.values())

        return replace(step, make=make)

    plan = plan_conversion(replace(source, fetch=fetch), Output("hf"))
    monkeypatch.setattr(engine, "_IN_FLIGHT", 20_000)
    monkeypatch.setattr(engine.os, "cpu_count", lambda: 8)
    execute(replace(plan, steps=[made(step) for step in plan.steps]), tmp_path / "out")
    assert 12_416 <= most <= 20_000  # the embedding alone has 97 x 64 x 2 bytes


def test_the_number_of_threads_is_as_before(tmp_path):
    before = torch.get_num_threads()
    execute(plan_conversion(model(), Output("hf")), tmp_path / "out")
    assert torch.get_num_threads() == before


def test_a_dry_run_says_files_and_needs_and_writes_nothing(tmp_path, capsys):
    make_hf(tmp_path / "m")
    before = snapshot(tmp_path)
    assert cli.main(["convert", str(tmp_path / "m"), str(tmp_path / "out"), "--to", "megatron", "--tp", "2", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "release/mp_rank_00/model_optim_rng.pt" in said and "release/mp_rank_01/model_optim_rng.pt" in said
    assert re.search(r"disk +[\d.]+ [kM]B needed, [\d.,]+ GB free; memory about", said)
    assert said.endswith("nothing was written (--dry-run)\n")
    assert snapshot(tmp_path) == before


def test_a_dry_run_finds_what_would_go_wrong(tmp_path, monkeypatch):
    plan = plan_conversion(model(), Output("hf"))
    make_hf(tmp_path / "other", weights="bin")
    with pytest.raises(ValueError, match="belongs to another model"):
        describe(plan, tmp_path / "other")
    monkeypatch.setattr("pyalpaca.files.space.free_space", lambda path: 1000)
    with pytest.raises(ValueError, match=r"are to be written, but 1.00 kB are free"):
        execute(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(tmp_path):
    """A model of 80 TB, without memory: its plan is made and refused."""
    config = replace(CONFIG, vocab_size=10**9, hidden_size=8192, num_heads=64, num_kv_heads=64, head_dim=128, num_layers=1)
    shapes = {name: torch.empty(shape, device="meta") for name, shape in _shapes(config).items()}
    with pytest.raises(ValueError, match=r"GB are to be written, but"):
        execute(plan_conversion(memory_reader(config, shapes), Output("native")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _shapes(config):
    from pyalpaca.model import parameters

    return {p.name: p.shape for p in parameters(config)}
