"""What a run says of itself elsewhere: TensorBoard, W&B, SwanLab, with stand-ins that note their calls; and the peaks."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_makers import records, settings

from pyalpaca.plan import known_tflops
from pyalpaca.train import TrainConfig, train
from pyalpaca.train.peaks import memory_bytes, peak_tflops
from pyalpaca.train.trackers import require_trackers

STAND_IN = """
import sys, types
calls = []
def note(name):
    return lambda *args, **kwargs: calls.append((name, args, kwargs))
def init(**kwargs):
    calls.append(("init", (), kwargs))
    return sys.modules[__name__]
log, finish = note("log"), note("finish")
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages of these names that note what is done with them."""
    for name in ("wandb", "swanlab", "tensorboard"):
        (tmp_path / f"{name}.py").write_text(STAND_IN)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "step"}


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_every_record_goes_to_the_project_and_the_entry_is_closed(road: Path, stand_ins: Path, name: str) -> None:
    run = stand_ins / "run"
    train(settings(road, run, steps=2, split="50,10,0", **{name: "alpaca"}))
    calls = sys.modules[name].calls
    assert [call[0] for call in calls] == ["init", "log", "log", "finish"]
    assert calls[0][2]["project"] == "alpaca" and calls[0][2]["config"]["steps"] == 2
    for (_, args, kwargs), record in zip(calls[1:3], records(run), strict=True):
        assert args == (numbers(record),) and kwargs == {"step": record["step"]}
    assert "valid_loss" in calls[2][1][0]
    train(settings(road, run, steps=3, split="50,10,0", resume=True, **{name: "alpaca"}))
    assert calls[-3][0] == "init" and calls[-2][2] == {"step": 3}
    if name == "wandb":  # the same entry goes on
        assert calls[-3][2]["id"] == calls[0][2]["id"] and calls[-3][2]["resume"] == "allow"


def test_tensorboard_gets_every_number(road: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    writer = SimpleNamespace(add_scalar=lambda *args: seen.append(args), close=lambda: seen.append(("closed",)))
    fake = SimpleNamespace(SummaryWriter=lambda folder: seen.append((folder,)) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    train(settings(road, stand_ins / "run", steps=2, tensorboard="events"))
    expected = [(k, v, r["step"]) for r in records(stand_ins / "run") for k, v in numbers(r).items()]
    assert seen == [("events",), *expected, ("closed",)]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_reads_the_events(road: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(settings(road, tmp_path / "run", tensorboard=str(tmp_path / "events")))
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (r["step"], pytest.approx(r["loss"])) for r in records(tmp_path / "run")
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "swanlab"])
def test_a_library_that_is_missing_is_named_before_anything_is_written(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("pyalpaca.train.trackers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"--{name} needs a package that is not installed: pip install {name}"):
        train(settings(road, tmp_path / "run", **{name: "x"}))
    assert not (tmp_path / "run").exists()
    require_trackers(TrainConfig())


def test_utilisation_is_a_share_of_the_peak_that_is_given_known_or_measured(road: Path, tmp_path: Path) -> None:
    train(settings(road, tmp_path / "run", steps=1, peak_tflops=2.0, recompute="full"))
    (record,) = records(tmp_path / "run")
    assert record["hfu"] == record["tflops"] / 2 and record["mfu"] == record["model_tflops"] / 2
    assert [known_tflops(name) for name in ("Ascend910B2", "Ascend 910b4", "NVIDIA A100-SXM4-80GB", "AMD EPYC")] == [
        *(354.0, 246.0, 312.0),
        None,
    ]
    a = torch.ones(64, 64)
    a @ a
    assert 1e-3 < peak_tflops(torch.device("cpu")) < 100


def test_the_memory_of_a_process_is_its_own_peak() -> None:
    before = memory_bytes(torch.device("cpu"))
    torch.ones(64 << 20, dtype=torch.uint8)
    assert memory_bytes(torch.device("cpu")) >= before > 50e6 or not Path("/proc/self/status").exists()


def test_the_journal_is_json_line_by_line_and_the_bar_is_for_terminals(
    road: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings(road, tmp_path / "run", steps=2))
    said = capsys.readouterr()
    assert said.out.count("lm loss") == 2 and "training" not in said.err  # no terminal here
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
