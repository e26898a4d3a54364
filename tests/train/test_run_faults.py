"""What goes wrong in a run is named, and the last good checkpoint is found: killed saves, full disks, damaged files, signals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crash_driver import supported
from train_makers import losses, records, settings

import pyalpaca
from pyalpaca.checkpoint import DamagedError, digest, open_checkpoint
from pyalpaca.train import loop, saving, train

seccomp = pytest.mark.skipif(not supported(), reason="the kernel has no seccomp user notification")


def environment() -> dict[str, str]:
    """Of a process that imports what the tests import."""
    paths = [Path(pyalpaca.__file__).parents[1], Path(__file__).parents[1], Path(__file__).parent]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, if there is one: what is tested here is order, and a disk takes its time to flush."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def sweep(how: str, folder: Path, stride: int) -> dict[str, Any]:
    command = [sys.executable, Path(__file__).with_name("save_jobs.py"), how, folder, str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["old"]["read"].split()[0], found["new"]["read"].split()[0]) == ("2", "4")
    return found


@seccomp
def test_a_save_that_is_killed_anywhere_leaves_a_whole_checkpoint_and_the_next_one_succeeds(memory: Path) -> None:
    found = sweep("kill", memory, stride=3)
    old, new = found["old"]["read"], found["new"]["read"]
    assert {outcome["left"]["read"] for outcome in found["outcomes"]} == {old, new}
    assert all(outcome["again"] == found["new"] for outcome in found["outcomes"])


@seccomp
def test_a_disk_that_fills_up_anywhere_is_one_sentence_and_the_old_checkpoint_is_as_it_was(memory: Path) -> None:
    found = sweep("full", memory, stride=3)
    failed = [outcome for outcome in found["outcomes"] if outcome["status"] == "error"]
    assert len(failed) > len(found["outcomes"]) / 2
    for outcome in failed:
        assert "step_0000004: rank 0 could not save it (No space left on device); the checkpoints before it" in outcome["text"]
        assert outcome["left"]["read"] in (found["old"]["read"], found["new"]["read"])  # new: `latest` was all it lacked
        assert not [name for name in outcome["left"]["files"] if "step_" in name and ".partial" in name]


def test_a_thread_writes_what_a_save_in_the_way_writes(road: Path, tmp_path: Path) -> None:
    threads = []
    write = saving.write_native_manifest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "write_native_manifest", lambda *a: (threads.append(threading.current_thread().name), write(*a)))
        for name, behind in (("behind", True), ("before", False)):
            train(settings(road, tmp_path / name / "run", save_every=1, keep=9, dtype="bf16", save_async=behind))
    assert threads == ["save"] * 4 + ["MainThread"] * 4
    assert losses(tmp_path / "behind" / "run") == losses(tmp_path / "before" / "run")
    for step in range(1, 5):
        behind, before = (files(tmp_path / name / "run" / f"step_000000{step}") for name in ("behind", "before"))
        assert behind.keys() == before.keys()
        for name in behind:
            if name == "manifest.json":
                tensors = [json.loads(manifest[name])["tensors"] for manifest in (behind, before)]
                assert tensors[0] == tensors[1]
            else:
                assert behind[name] == before[name], name


def test_a_state_that_trains_on_is_saved_as_it_was(road: Path, tmp_path: Path) -> None:
    """The writer is held until the next steps are done, and writes the weights of its own step all the same."""
    config = settings(road, tmp_path / "run", save_every=2, keep=9)
    train(replace(config, output=str(tmp_path / "plain"), save_async=False))
    stepped, write, step = threading.Event(), saving.write_native_shard, loop.train_step

    def late(*arguments: Any) -> Any:
        assert stepped.wait(30)
        return write(*arguments)

    def steps(state: Any, *rest: Any) -> Any:
        result = step(state, *rest)
        if result[0].step == 3:
            stepped.set()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "write_native_shard", late)
        patch.setattr(loop, "train_step", steps)
        train(config)
    for name in ("step_0000002", "step_0000004"):
        assert digest(open_checkpoint(tmp_path / "run" / name)) == digest(open_checkpoint(tmp_path / "plain" / name))


def test_a_save_that_fails_behind_ends_the_run_at_the_end_of_a_step(road: Path, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "write_native_manifest", full)
        with pytest.raises(OSError, match=r"step_0000001: rank 0 could not save it \(No space left on device\)"):
            train(settings(road, tmp_path / "run", steps=200, save_every=1))
    assert len(records(tmp_path / "run")) < 200
    assert not list((tmp_path / "run").glob("step_*"))


@pytest.fixture(scope="module")
def saved(road: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints at 2 and 4."""
    run = tmp_path_factory.mktemp("saved") / "run"
    train(settings(road, run, save_every=2))
    return run


def copy(saved: Path, run: Path) -> Path:
    subprocess.run(["cp", "-r", saved, run], check=True)
    return run


DAMAGES = {
    "cut": lambda data: data[:-9],
    "empty": lambda data: b"",
    "head": lambda data: bytes([data[0] ^ 4, *data[1:]]),
    "middle": lambda data: bytes([*data[: len(data) // 2], data[len(data) // 2] ^ 1, *data[len(data) // 2 + 1 :]]),
    "tail": lambda data: bytes([*data[:-2], data[-2] ^ 64, data[-1]]),
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", "model-tp00-pp00.safetensors", "optimizer-tp00-pp00.safetensors"])
def test_a_damaged_file_is_named_and_the_last_good_checkpoint_goes_on(
    road: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    run = copy(saved, tmp_path / "run")
    file, change = run / "step_0000004" / name, DAMAGES[damage]
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))
    if not name.startswith("optimizer"):
        with pytest.raises(DamagedError, match=f"{name}: .*; use .*step_0000002, the last good checkpoint"):
            digest(open_checkpoint(run))
    train(settings(road, run, resume=True))
    said = capsys.readouterr().err
    assert f"warning: {file}: " in said
    assert f"use {run / 'step_0000002'}, the last good checkpoint" in said
    assert losses(run) == losses(saved)
    assert sorted(p.name for p in run.glob("step_*")) == ["step_0000002", "step_0000004", "step_0000004.damaged"]
    assert files(run / "step_0000004").keys() == files(saved / "step_0000004").keys()


@pytest.mark.parametrize("latest", [None, "", "step_0000009", "stfp_0000004"])
def test_a_damaged_latest_is_named_and_the_newest_checkpoint_goes_on(
    road: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], latest: str | None
) -> None:
    run = copy(saved, tmp_path / "run")
    (run / "latest").unlink() if latest is None else (run / "latest").write_text(latest)
    assert train(settings(road, run, resume=True)) == {"steps": 0}
    assert f"warning: {run / 'latest'}: " in (said := capsys.readouterr().err) or "latest names it" in said
    assert (run / "latest").read_text() == "step_0000004\n"


def test_where_no_checkpoint_is_whole_the_run_says_so_and_touches_nothing(road: Path, saved: Path, tmp_path: Path) -> None:
    run = copy(saved, tmp_path / "run")
    for manifest in run.glob("step_*/manifest.json"):
        manifest.write_text("{}")
    with pytest.raises(ValueError, match="none of its 2 checkpoints is whole"):
        train(settings(road, run, resume=True))
    assert (run / "step_0000002").is_dir()
