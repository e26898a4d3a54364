"""A rank that dies, hangs or stops is named by the others, and a signal ends a run after a checkpoint: under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from train_makers import losses, records, settings, train_all

import pyalpaca
from pyalpaca.checkpoint import digest, open_checkpoint
from pyalpaca.train import TrainConfig, loop, train

FAULTY = """
import os, signal, sys, time
from pyalpaca.cli import run
from pyalpaca.train import loop
from pyalpaca.train.run import main

what, rank, at = os.environ["FAULT"].split(":")
step = loop.train_step

def faulty(state, *rest):
    mine = os.environ.get("RANK", "0") == rank and state.step + 1 == int(at)
    if mine and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        if what == "hang":
            time.sleep(600)
        if what == "raise":
            raise KeyError("a pity")
        os.kill(os.getpid(), getattr(signal, what))
    return step(state, *rest)

loop.train_step = faulty
run(main)
"""


def flags(config: TrainConfig) -> list[str]:
    """The command line that gives these settings."""
    found = []
    for field in fields(TrainConfig):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        if value != field.default:
            found += ([f"--{flag}"] if value else [f"--no-{flag}"]) if isinstance(value, bool) else [f"--{flag}", str(value)]
    return found


def disturbed(
    tmp_path: Path, fault: str, config: TrainConfig, ranks: int = 2, *launcher: str
) -> subprocess.CompletedProcess[str]:
    """The run, by torchrun or, with one rank, without it; fault: SIGNAME, hang or raise, at which rank and step."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *launcher]
    command = [sys.executable, *(torchrun if ranks > 1 else []), tmp_path / "faulty.py", *flags(config)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pyalpaca.__file__).parents[1]), "FAULT": fault}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


def sentences(done: subprocess.CompletedProcess[str]) -> list[str]:
    return sorted(line for line in done.stderr.splitlines() if line.startswith("error: "))


@pytest.fixture(scope="module")
def undisturbed(road: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """What a run of six steps on two ranks is to come to; the settings, with its folder."""
    config = settings(road, tmp_path_factory.mktemp("undisturbed") / "run", steps=6, save_every=2, tp=2)
    launch(2, train_all, [config])
    return config


def test_a_rank_that_dies_is_named_and_torchrun_starts_the_run_again_where_it_was(
    undisturbed: TrainConfig, tmp_path: Path
) -> None:
    config = replace(undisturbed, output=str(tmp_path / "run"))
    done = disturbed(tmp_path, "SIGKILL:1:4", config, 2, "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    (sentence,) = sentences(done)
    assert sentence.startswith("error: step 4: rank 0 failed in all_reduce (parallel/axis.py:")
    assert ": rank 1 has died, last seen at step 4 in " in sentence
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path / "run") == losses(Path(undisturbed.output))
    assert digest(open_checkpoint(tmp_path / "run")) == digest(open_checkpoint(undisturbed.output))
    # What was refused stays refused, however often torchrun tries.
    again = disturbed(tmp_path, "none:9:9", replace(config, steps=8), 2, "--max-restarts", "1")
    assert again.returncode == 1
    assert set(sentences(again)) == {
        f"error: {tmp_path / 'run'}: holds the checkpoints of a run; give --resume to go on with it, or another --output"
    }
    assert len(records(tmp_path / "run")) == 6


def test_a_rank_that_hangs_is_named_within_the_time_out(undisturbed: TrainConfig, tmp_path: Path) -> None:
    config = replace(undisturbed, output=str(tmp_path / "run"), timeout=0.05)
    done = disturbed(tmp_path, "hang:0:4", config)
    assert done.returncode == 1
    itself, sentence = sentences(done)
    assert itself.startswith("error: step 4: rank 0 hangs in ") and itself.endswith("; the others have ended")
    assert sentence.startswith("error: step 4: rank 1 failed in all_reduce (parallel/axis.py:")
    assert ": rank 0 hangs at step 4 in " in sentence


def test_a_rank_that_stops_by_an_error_is_named_with_it(undisturbed: TrainConfig, tmp_path: Path) -> None:
    done = disturbed(tmp_path, "raise:1:4", replace(undisturbed, output=str(tmp_path / "run")))
    assert done.returncode == 1
    (sentence,) = sentences(done)
    assert sentence.endswith(": rank 1 stopped at step 4 (KeyError: 'a pity'); go on with --resume")


@pytest.mark.parametrize(("signal", "ranks", "status"), [("SIGTERM", 2, 1), ("SIGTERM", 1, 143), ("SIGINT", 1, 130)])
def test_a_signal_lets_the_step_end_saves_and_the_run_goes_on_later(
    undisturbed: TrainConfig, tmp_path: Path, signal: str, ranks: int, status: int
) -> None:
    """It comes to the last rank alone, before step 3; torchrun itself ends with 1 whatever its processes say."""
    config = replace(undisturbed, output=str(tmp_path / "run"), tp=ranks)
    done = disturbed(tmp_path, f"{signal}:{ranks - 1}:3", config, ranks)
    assert done.returncode == status, done.stderr
    said = f"{tmp_path / 'run'}: {signal} came; the running step was finished and saved, go on with --resume"
    assert said in done.stderr.splitlines()
    assert f"exitcode  : {143 if signal == 'SIGTERM' else 130} " in done.stderr or ranks == 1
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3]
    assert (tmp_path / "run" / "latest").read_text() == "step_0000003\n"
    launch(ranks, train_all, [replace(config, resume=True)])
    assert losses(tmp_path / "run") == pytest.approx(losses(Path(undisturbed.output)), abs=0 if ranks == 2 else 1e-5)


def disagree(road: Path, folder: Path) -> str:
    """One of two data-parallel ranks loses an update, as a device that miscalculates would do; what each rank says."""
    step = loop.train_step

    def faulty(state: Any, tokens: Any, labels: Any, setup: Any, starts: Any) -> Any:
        new, metrics = step(state, tokens, labels, setup, starts)
        return (replace(new, updates=new.updates - 1) if setup.mesh.rank == 1 and new.step == 2 else new), metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", faulty)
        with pytest.raises(FloatingPointError) as error:
            train(settings(road, folder / "run"))
    return str(error.value)


def test_ranks_that_do_not_do_the_same_update_stop(road: Path, tmp_path: Path) -> None:
    first, second = launch(2, disagree, road, tmp_path)
    assert first == second
    assert first.startswith("step 2: some ranks found a gradient that is not finite where others did not")
