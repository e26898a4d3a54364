"""A run that stopped goes on as if it never had, in its own layout to the bit and in any other to rounding."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from train_makers import losses, records, settings, train_all

import pyalpaca
from pyalpaca.checkpoint import digest, native_tensors, open_checkpoint
from pyalpaca.train import TrainConfig, loop, saving, train

LORA = {"lora_r": 2, "lora_alpha": 8.0}


def stop_after(steps: int, config: TrainConfig) -> None:
    """The run, interrupted after that many steps."""
    with pytest.MonkeyPatch.context() as patch:
        step = loop.train_step

        def until(state: Any, *rest: Any) -> Any:
            if state.step == steps:
                raise KeyboardInterrupt
            return step(state, *rest)

        patch.setattr(loop, "train_step", until)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def optimizer_tensors(run: Path) -> dict[str, list[float]]:
    tensors = native_tensors(run, "optimizer")
    return {name: tensors.read(name, None).flatten().tolist() for name in tensors.shapes}


@pytest.mark.parametrize("kind", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_is_bit_identical(road: Path, tmp_path: Path, dtype: str, kind: dict[str, Any]) -> None:
    # In fp16 the first scale overflows: skipped steps and the scale itself must come back too.
    usual = {"dtype": dtype, "loss_scale": 2.0**24, "hysteresis": 1, "loss_scale_window": 2, "steps": 6, "save_every": 3, **kind}
    never = settings(road, tmp_path / "never", **usual)
    train(never)
    stopped = settings(road, tmp_path / "stopped", **usual)
    stop_after(5, stopped)
    assert len(records(tmp_path / "stopped")) == 5
    train(replace(stopped, resume=True))
    assert [r["step"] for r in records(tmp_path / "stopped")] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "learning_rate", "loss_scale", "skipped", "samples"):
        assert [r[key] for r in records(tmp_path / "stopped")] == [r[key] for r in records(tmp_path / "never")], key
    assert (records(tmp_path / "never")[-1]["skipped"] > 0) == (dtype == "fp16")
    assert digest(open_checkpoint(tmp_path / "stopped")) == digest(open_checkpoint(tmp_path / "never"))
    assert optimizer_tensors(tmp_path / "stopped") == optimizer_tensors(tmp_path / "never")


def test_a_run_goes_on_in_another_layout_and_comes_back(road: Path, tmp_path: Path) -> None:
    full = settings(road, tmp_path / "full", steps=6, save_every=2, global_batch_size=16, keep=5)
    lora = replace(full, output=str(tmp_path / "lora"), **LORA)
    for config in (full, lora):
        train(replace(config, output=f"{config.output}-one"))
        stop_after(2, config)
    many = [replace(full, tp=2, pp=2), replace(lora, tp=2)]  # of 4 processes: the second is data-parallel
    launch(4, train_all, [replace(config, resume=True, steps=4, lr_decay_steps=6) for config in many])
    for config in (full, lora):
        train(replace(config, resume=True))
        assert losses(Path(config.output)) == pytest.approx(losses(Path(f"{config.output}-one")), abs=1e-5)
        assert [r["samples"] for r in records(Path(config.output))] == [16, 32, 48, 64, 80, 96]


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_half_written(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(road, tmp_path / "run", save_every=2)
    stop_after(2, config)
    before = digest(open_checkpoint(tmp_path / "run"))

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_native_manifest", full)
        with pytest.raises(OSError, match="no space left"):
            train(replace(config, resume=True))
    assert digest(open_checkpoint(tmp_path / "run")) == before
    assert [p.name for p in (tmp_path / "run").glob("step_*")] == ["step_0000002"]


KILLED = """
import os, signal, sys
from pyalpaca.train import TrainConfig, saving, train

write = saving.write_native_manifest
def second(folder, *rest):
    if "step_0000004" in folder.name:
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, *rest)

saving.write_native_manifest = second
train(TrainConfig(**eval(sys.argv[1])))
"""


def test_a_killed_save_is_swept_away_when_the_run_goes_on(road: Path, tmp_path: Path) -> None:
    train(settings(road, tmp_path / "never"))
    config = settings(road, tmp_path / "run", save_every=2)
    # As many threads as here: sums of another number of threads differ in the last bit.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pyalpaca.__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, repr(vars(config))]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "run").glob("step_*")) == ["step_0000002", "step_0000004.partial"]
    assert open_checkpoint(tmp_path / "run").path.name == "step_0000002"
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # and the next record was cut off
    train(replace(config, resume=True))
    assert sorted(p.name for p in (tmp_path / "run").glob("step_*")) == ["step_0000002", "step_0000004"]
    assert losses(tmp_path / "run") == losses(tmp_path / "never")


def test_a_step_that_latest_does_not_know_pushes_nothing_out(road: Path, tmp_path: Path) -> None:
    config = settings(road, tmp_path / "run", steps=2, keep=1)
    train(config)
    (tmp_path / "run" / "step_0000099").mkdir()
    train(replace(config, steps=3, resume=True))
    assert open_checkpoint(tmp_path / "run").path.name == "step_0000003"


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({}, LORA, "lora_A.weight is missing, this run expects"),
        (LORA, {}, "the optimizer state is that of another run"),
        (LORA, {**LORA, "lora_r": 4}, r"is \(2, 32\), this run expects \(4, 32\)"),
        ({}, {"dtype": "bf16"}, "the optimizer state is that of another run"),
        ({"dtype": "bf16"}, {}, "the optimizer state is that of another run"),
    ],
)
def test_another_runs_checkpoint_is_refused(
    road: Path, tmp_path: Path, first: dict[str, Any], then: dict[str, Any], message: str
) -> None:
    train(settings(road, tmp_path / "run", steps=1, **first))
    before = (tmp_path / "run" / "train.json").read_text()
    with pytest.raises(ValueError, match=message):
        train(settings(road, tmp_path / "run", resume=True, **then))
    assert (tmp_path / "run" / "train.json").read_text() == before
