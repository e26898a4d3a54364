"""A training that can't fit is refused before anything is loaded or written; the bytes that a step moves are recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launch import launch
from train_makers import MODEL, records, settings, train_all

from pyalpaca.parallel import Mesh
from pyalpaca.plan import free_memory, traffic
from pyalpaca.train import fit, train
from pyalpaca.train.fit import check_fits, device_memory, planned_job

CPU = torch.device("cpu")


def test_a_training_larger_than_the_memory_is_refused_with_the_reason(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "free_memory", lambda: 1_000_000)
    with pytest.raises(ValueError, match=r"hf: this training does not fit: a device needs .*, and this machine has 1.00 MB"):
        train(settings(road, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(fit, "free_memory", lambda: 1 << 40)
    assert train(settings(road, tmp_path / "run", steps=1))["steps"] == 1


def test_what_is_too_much_may_fit_with_recomputation(road: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(road, Path(), micro_batch_size=8, seq_length=256)
    monkeypatch.setattr(fit, "free_memory", lambda: 7_000_000)
    with pytest.raises(ValueError, match="give --recompute full, or a smaller micro batch"):
        check_fits(config, MODEL, Mesh(CPU))
    check_fits(settings(road, Path(), micro_batch_size=8, seq_length=256, recompute="full"), MODEL, Mesh(CPU))


def test_processes_share_the_memory_that_is_free() -> None:
    free = free_memory()
    assert free is not None and free > 1e7
    assert device_memory(CPU, 4) == pytest.approx(free / 4, rel=0.2)


def test_the_bytes_that_a_step_moves_are_recorded_where_that_is_asked_for(road: Path, tmp_path: Path) -> None:
    config = settings(road, tmp_path / "run", steps=2, tp=2, count_bytes=True)
    launch(2, train_all, [config])
    moved = {key: count for key, count in records(tmp_path / "run")[1].items() if key.startswith("moved_")}
    expected = traffic(planned_job(config, MODEL, 1, 0), 0, 0)
    assert moved == {f"moved_{axis}_{collective}": count for (axis, collective), count in expected.items()}
    assert json.loads((tmp_path / "run" / "train.json").read_text())["count_bytes"] is True


def test_nothing_is_counted_unasked(road: Path, tmp_path: Path) -> None:
    train(settings(road, tmp_path / "run", steps=1))
    assert not [key for key in records(tmp_path / "run")[0] if key.startswith("moved_")]
