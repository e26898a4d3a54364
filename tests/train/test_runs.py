"""Whole runs of a few steps: what they write, what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from train_makers import MODEL, losses, records, settings

from pyalpaca.checkpoint import digest, memory_reader, open_checkpoint, write_meta, write_native
from pyalpaca.cli import run as run_command
from pyalpaca.commands import convert
from pyalpaca.data import batch, indexed_writer, open_instruction_data
from pyalpaca.model import flatten, parameters
from pyalpaca.train import train
from pyalpaca.train.run import main
from pyalpaca.train.saving import Saver


def test_a_run_records_every_step_and_its_checkpoint_holds_the_trained_weights(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: dict[str, torch.Tensor] = {}
    save = Saver.save

    def watch(saver: Saver, state: Any, *links: str) -> Path:
        trained.update({p.name: flatten(state.params)[p.path].clone() for p in parameters(MODEL)})
        return save(saver, state, *links)

    monkeypatch.setattr(Saver, "save", watch)
    config = settings(road, tmp_path / "run", log_every=3)
    summary = train(config)
    seen = records(tmp_path / "run")
    assert [r["step"] for r in seen] == [1, 2, 3, 4]
    assert [r["samples"] for r in seen] == [8, 16, 24, 32]
    assert seen[-1]["loss"] < seen[0]["loss"]
    assert all(r["seconds"] > 0 and r["tflops"] == r["model_tflops"] > 0 and r["skipped"] == 0 for r in seen)
    assert (summary["steps"], summary["loss_first"], summary["loss_last"]) == (4, seen[0]["loss"], seen[-1]["loss"])
    assert json.loads((tmp_path / "run" / "train.json").read_text())["lr"] == config.lr
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["3/", "4/"]
    assert lines[2].startswith("| devices | parameters | layout") and lines[4].startswith("| 1 cpu   | ")
    assert len({len(line) for line in lines[2:]}) == 1
    reader = open_checkpoint(tmp_path / "run")
    assert digest(reader) == digest(memory_reader(MODEL, trained))
    assert digest(reader) != digest(open_checkpoint(road / "hf"))
    assert reader.tokenizer == tmp_path / "run"
    assert reader.path.name == (tmp_path / "run" / "latest").read_text().strip() == "step_0000004"


def test_every_layout_is_a_start_and_a_seed_gives_a_run_again(road: Path, tmp_path: Path) -> None:
    write_meta(open_checkpoint(road / "hf"), tmp_path / "meta", num_shards=2)
    for name, model in (("hf", road / "hf"), ("native", road / "native"), ("meta", tmp_path / "meta")):
        train(settings(road, tmp_path / "runs" / name, model=str(model), steps=2))
    assert losses(tmp_path / "runs" / "hf") == losses(tmp_path / "runs" / "native") == losses(tmp_path / "runs" / "meta")
    train(settings(road, tmp_path / "other", steps=2, seed=1))
    assert losses(tmp_path / "other") != losses(tmp_path / "runs" / "hf")


def test_recomputation_is_counted_as_work_but_not_as_the_models(road: Path, tmp_path: Path) -> None:
    for mode, every, work in (("full", 1, 4 / 3), ("full", 2, 3.5 / 3), ("selective", 1, 1)):
        run = tmp_path / f"{mode}{every}"
        train(settings(road, run, steps=1, recompute=mode, recompute_every=every))
        assert records(run)[0]["tflops"] == pytest.approx(records(run)[0]["model_tflops"] * work)


def test_text_is_trained_on_too(road: Path, tmp_path: Path) -> None:
    with indexed_writer(tmp_path / "plain_text_document") as writer:
        writer.add([1, *range(100, 180)])
        writer.end_document()
    config = settings(road, tmp_path / "run", data=str(tmp_path / "plain"), data_type="text", seq_length=16, global_batch_size=4)
    train(config)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_only_the_newest_checkpoints_are_kept(road: Path, tmp_path: Path) -> None:
    train(settings(road, tmp_path / "run", steps=5, save_every=1, keep=2))
    assert sorted(p.name for p in (tmp_path / "run").glob("step_*")) == ["step_0000004", "step_0000005"]


@pytest.mark.parametrize("lora", [{}, {"lora_r": 2, "lora_alpha": 8.0, "lora_full": "lm_head"}], ids=["full", "lora"])
def test_transformers_reads_the_export_and_gives_the_same_loss(road: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    from transformers import LlamaForCausalLM

    train(settings(road, tmp_path / "run", lr=2e-2, **lora))
    convert.main([str(tmp_path / "run"), str(tmp_path / "hf"), "--to", "hf"])
    train(settings(road, tmp_path / "again", model=str(tmp_path / "hf"), steps=1))
    tokens, labels = batch(open_instruction_data(road / "data"), 0, 8, 42, 48)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        theirs = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=-100).item()
    assert losses(tmp_path / "again")[0] == pytest.approx(theirs, abs=1e-5)
    assert abs(theirs - losses(tmp_path / "run")[0]) > 0.1


def spoiled(road: Path, folder: Path, value: float) -> Path:
    reader = open_checkpoint(road / "hf")
    tensors = {name: reader.read(name).clone() for name in reader.names}
    tensors["lm_head.weight"][0, 0] = value
    write_native(memory_reader(MODEL, tensors), folder)
    return folder


def test_a_diverged_run_is_one_sentence_and_status_2(road: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = spoiled(road, tmp_path / "model", float("nan"))
    flags = ["--data", str(road / "data"), "--output", str(tmp_path / "run"), "--steps", "1", "--seq-length", "48"]
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main(["--model", str(model), *flags]))
    assert end.value.code == 2
    assert "error: step 1: loss nan" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main(["--model", str(model), *flags, "--on-nan", "skip"]))
    assert end.value.code == 0
    assert "lm loss: NAN" in capsys.readouterr().out
    assert records(tmp_path / "run")[0]["nan_steps"] == 1
    assert digest(open_checkpoint(tmp_path / "run")) == digest(open_checkpoint(model))


def without_an_answer(road: Path) -> dict[str, Any]:
    return {"seq_length": 1}


def of_another_tokenizer(road: Path) -> dict[str, Any]:
    prefix = road / "foreign"
    for key in ("input_ids", "labels"):
        with indexed_writer(f"{prefix}_{key}_document") as writer:
            writer.add([1, 5, MODEL.vocab_size, 2])
            writer.end_document()
    return {"data": str(prefix)}


BAD: list[tuple[Callable[[Path], dict[str, Any]], str]] = [
    (without_an_answer, "none of its 60 samples has an answer within 1 tokens; raise --seq-length"),
    (of_another_tokenizer, "holds the token 421, but the model in .*hf has 421 tokens; prepare the data with the model's own"),
    (lambda road: {"split": "0,1,0"}, "the split '0,1,0' leaves no sample to train on"),
    (lambda road: {"split": "a"}, "split 'a': expected up to three numbers"),
    (lambda road: {"data": str(road / "none")}, "none_packed_input_ids_document.idx: no such file"),
    (lambda road: {"model": str(road / "none")}, "none: not found, expected a checkpoint folder"),
    (lambda road: {"micro_batch_size": 3}, "global batch size 8 is not a multiple of micro batch size 3 x data-parallel size 1"),
    (lambda road: {"tp": 2, "pp": 2}, "1 process can't form tensor-parallel 2 x pipeline-parallel 2: start a multiple of 4"),
    (lambda road: {"lora": str(road / "tokenizer")}, "tokenizer/adapter_config.json: not found"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    road: Path, tmp_path: Path, change: Callable[[Path], dict[str, Any]], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(settings(road, tmp_path / "run", **change(road)))
    assert not list(tmp_path.iterdir())


def test_samples_that_teach_nothing_are_pointed_out(road: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"\d+ of 60 samples have no answer within 20 tokens and teach nothing"):
        train(settings(road, tmp_path / "run", steps=1, seq_length=20))


def test_a_folder_that_holds_a_run_is_not_overwritten(road: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(settings(road, tmp_path / "run"))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(
        ValueError, match="run: holds the checkpoints of a run; give --resume to go on with it, or another --output"
    ):
        train(settings(road, tmp_path / "run", steps=1))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    again = settings(road, tmp_path / "run", resume=True)
    assert train(again) == train(replace(again, model=again.output)) == {"steps": 0}
    assert "has done 4 steps and 4 are asked for, so nothing is left to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="hf: is the folder of the model itself"):
        train(settings(road, road / "hf"))
