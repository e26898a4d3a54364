"""Evaluation: the token mean over a whole share, equal to transformers' and the same in every layout; best and early stop."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launch import launch
from train_makers import MODEL, records, settings, train_all

from pyalpaca.checkpoint import digest, open_checkpoint
from pyalpaca.data import open_instruction_data, ordered_batch, split_instruction_data
from pyalpaca.parallel import Mesh
from pyalpaca.train import loop, train
from pyalpaca.train.evaluate import Best, Evaluation, best_of, evaluate, next_best
from pyalpaca.train.prepare import plan, start

SPLIT = {"split": "40,13,7", "eval_every": 2}


def theirs(model: Path, road: Path, share: int, samples: int, seq_length: int = 48) -> tuple[float, int]:
    """The token mean and the number of labels by transformers, sample by sample."""
    from transformers import LlamaForCausalLM

    data = split_instruction_data(open_instruction_data(road / "data"), SPLIT["split"])[share]
    of, losses, count = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32), 0.0, 0
    for n in range(samples):
        tokens, labels = ordered_batch(data, n, n + 1, 1, seq_length, 1)
        with torch.no_grad():
            losses += F.cross_entropy(of(tokens).logits[0], labels[0], ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return losses / count, count


@pytest.mark.filterwarnings("ignore:.*have no answer")
@pytest.mark.parametrize(("micro_batch", "samples", "pad_to"), [(2, 0, 0), (4, 0, 8), (4, 5, 0)])
def test_the_loss_is_transformers_token_mean(road: Path, tmp_path: Path, micro_batch: int, samples: int, pad_to: int) -> None:
    changes = {"steps": 1, "lr": 0.0, "micro_batch_size": micro_batch, "eval_samples": samples, "pad_to": pad_to}
    train(settings(road, tmp_path / "run", **{**SPLIT, **changes}))
    found = records(tmp_path / "run")[-1]
    for share, name, size in ((1, "valid", 13), (2, "test", 7)):
        loss, count = theirs(road / "hf", road, share, min(samples or size, size))
        assert found[f"{name}_loss"] == pytest.approx(loss, abs=1e-5)
        assert found[f"{name}_tokens"] == count


def test_micro_batches_without_a_label_divide_by_nothing(road: Path) -> None:
    config = settings(road, Path(), micro_batch_size=1, seq_length=12)  # most answers begin later
    data = open_instruction_data(road / "data")
    setup = plan(MODEL, config, Mesh(torch.device("cpu")))
    state = start(config, setup, open_checkpoint(road / "hf"))
    assert 0 < data.silent(12) < len(data)
    found = evaluate(state.params, data, setup)
    together = evaluate(state.params, data, replace(setup, config=replace(config, micro_batch_size=60)))
    assert math.isfinite(found.loss) and found.loss == pytest.approx(together.loss, abs=1e-5)
    silent = evaluate(state.params, data, replace(setup, config=replace(config, seq_length=1)))
    assert math.isnan(silent.loss) and silent.tokens == 0


def test_every_layout_gives_the_same_losses(road: Path, tmp_path: Path) -> None:
    one = settings(road, tmp_path / "one", **SPLIT)
    train(one)
    layouts: dict[str, Any] = {"tp2-pp2": {"tp": 2, "pp": 2}, "pp2-dp2": {"pp": 2}, "tp2-cp2": {"tp": 2, "cp": 2}, "dp4": {}}
    launch(4, train_all, [replace(one, output=str(tmp_path / name), **sizes) for name, sizes in layouts.items()])
    expected = records(tmp_path / "one")
    assert ["valid_loss" in r for r in expected] == [False, True, False, True]
    assert ["test_loss" in r for r in expected] == [False, False, False, True]
    for name in layouts:
        for found, wanted in zip(records(tmp_path / name), expected, strict=True):
            for key in wanted.keys() & {"loss", "valid_loss", "valid_tokens", "test_loss", "test_tokens"}:
                assert found[key] == pytest.approx(wanted[key], abs=1e-5), (name, key)


def test_evaluation_changes_nothing_that_is_trained(road: Path, tmp_path: Path) -> None:
    for name, changes in (("a", {"eval_every": 1}), ("b", {"eval_every": 3, "eval_samples": 1, "micro_batch_size": 2})):
        train(settings(road, tmp_path / name, **{**SPLIT, **changes}))
    assert [r["loss"] for r in records(tmp_path / "a")] == [r["loss"] for r in records(tmp_path / "b")]
    assert digest(open_checkpoint(tmp_path / "a")) == digest(open_checkpoint(tmp_path / "b"))


def test_evaluations_are_logged_and_summed_up(road: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train(settings(road, tmp_path / "run", **SPLIT))
    last = records(tmp_path / "run")[-1]
    lines = [line for line in capsys.readouterr().out.splitlines() if " loss at iteration" in line]
    assert [line.split()[0] + line.split()[4] for line in lines] == ["validation2", "validation4", "test4"]
    assert f"lm loss: {last['valid_loss']:.6E} | perplexity: {math.exp(last['valid_loss']):.4E}" in lines[1]
    assert (summary["valid_loss"], summary["test_loss"]) == (last["valid_loss"], last["test_loss"])
    assert (summary["valid_loss_best"], summary["best_step"]) == (last["valid_loss"], 4)


def scripted(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Evaluations that find these losses, one after another."""
    left = iter(losses.values())
    monkeypatch.setattr(loop, "evaluate", lambda *_: Evaluation(next(left), 1))


def test_the_best_checkpoint_stays_whatever_is_kept(road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 1.5})
    run = tmp_path / "run"
    train(settings(road, run, split="50,10,0", eval_every=1, save_every=1, keep=2, steps=5))
    assert sorted(p.name for p in run.glob("step_*")) == ["step_0000002", "step_0000004", "step_0000005"]
    assert open_checkpoint(run / "best").path.resolve().name == "step_0000002"
    assert open_checkpoint(run).path.name == "step_0000005"


def test_without_keep_best_only_the_newest_are_kept(road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {1: 1.0, 2: 2.0, 3: 3.0})
    train(settings(road, tmp_path / "run", split="50,10,0", eval_every=1, keep=2, steps=3, keep_best=False))
    assert [p.name for p in (tmp_path / "run").glob("step_*")] == ["step_0000003"]
    assert not (tmp_path / "run" / "best").exists()


def test_a_run_stops_when_its_patience_is_lost_and_stays_stopped(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(road, tmp_path / "run", split="50,10,0", eval_every=1, patience=2, steps=50)
    scripted(monkeypatch, {1: 3.0, 2: 2.0, 3: 2.0, 4: float("nan"), 5: 0.0})
    summary = train(config)
    assert (summary["steps"], summary["best_step"], summary["stopped_early"]) == (4, 2, True)
    assert open_checkpoint(tmp_path / "run").path.name == "step_0000004"
    capsys.readouterr()
    assert train(replace(config, resume=True)) == {"steps": 0}
    assert "run: stopped at step 4, 2 evaluations after its best at step 2; raise --patience" in capsys.readouterr().out
    assert train(replace(config, resume=True, patience=3, steps=5))["best_step"] == 5


def test_a_run_that_resumes_knows_its_best_again() -> None:
    rows: list[dict[str, Any]] = [{"step": 1}, {"step": 2, "valid_loss": 2.0}, {"step": 4, "valid_loss": 1.0}]
    rows += [{"step": 5}, {"step": 6, "valid_loss": math.nan}, {"step": 8, "valid_loss": 1.5}]
    assert best_of(rows) == Best(1.0, 4, 2)
    assert next_best(best_of(rows), 9, 0.5) == Best(0.5, 9, 0)
    assert best_of([]) == Best()


def test_a_share_that_is_asked_for_but_empty_is_refused(road: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the split '1,0,0' leaves none of 60 samples to evaluate; raise its second number"):
        train(settings(road, tmp_path / "run", eval_every=1))
    assert not (tmp_path / "run").exists()
