"""Packed rows: the losses and gradients of their samples alone, in every layout, and resumed to the bit."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from test_deepspeed import with_deepspeed
from test_step import begin
from train_makers import losses, records, settings, train_all

from pyalpaca.checkpoint import digest, open_checkpoint
from pyalpaca.data import batch, batch_starts, open_instruction_data, pack
from pyalpaca.train import TrainConfig, train
from pyalpaca.train.step import gradients

LENGTH = 128


def test_loss_and_gradients_are_those_of_the_samples_alone(road: Path) -> None:
    whole = open_instruction_data(road / "data")
    packed = pack(whole, LENGTH)
    assert 2 * len(packed) < len(whole) and packed.filled() > 0.9
    found = {}
    for name, data, starts in (
        ("alone", whole, None),
        ("packed", packed, batch_starts(packed, 0, len(packed), 42)),
        ("mixed", packed, None),
    ):
        state, setup = begin(TrainConfig(micro_batch_size=1, global_batch_size=len(data)))
        tokens, labels = (x.unsqueeze(0) for x in batch(data, 0, len(data), 42, LENGTH))
        found[name] = gradients(state.params, tokens, labels, 1.0, setup, 0, starts)
    torch.testing.assert_close(found["packed"], found["alone"], atol=1e-6, rtol=1e-4)
    assert abs(found["mixed"][1] - found["alone"][1]) > 1e-4  # a sample that sees another one has another loss


PACKED: dict[str, Any] = {"pack": True, "seq_length": LENGTH, "lora_r": 2, "lora_dropout": 0.1, "steps": 4, "save_every": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2 sp": {"tp": 2, "sequence_parallel": True, "recompute": "selective"},
    "pp2 zb-h1": {"pp": 2, "schedule": "zb-h1", "recompute": "full"},
    "dp2 zero1": {"zero": 1, "micro_batch_size": 1},
}


def test_every_layout_has_the_same_losses(road: Path, tmp_path: Path) -> None:
    base = settings(road, tmp_path / "alone", split="50,10,0", eval_every=4, **PACKED)
    train(base)
    launch(2, train_all, [replace(base, output=str(tmp_path / name), **changes) for name, changes in LAYOUTS.items()])
    for name in LAYOUTS:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "alone"), abs=1e-5), name
    unpacked = settings(road, tmp_path / "unpacked", split="50,10,0", steps=1, lr=0.0, **{"lora_r": 2, "seq_length": LENGTH})
    train(unpacked)  # what is evaluated is not packed, so that numbers can be compared
    assert records(tmp_path / "unpacked")[-1]["valid_tokens"] == records(tmp_path / "alone")[-1]["valid_tokens"]


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_has_them_too(road: Path, tmp_path: Path) -> None:
    base = settings(road, tmp_path / "alone", **PACKED)
    train(base)
    theirs = with_deepspeed(base, tmp_path, 2)
    launch(2, train_all, [theirs])
    assert losses(Path(theirs.output)) == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


def test_a_run_goes_on_to_the_bit_and_only_with_rows_as_before(road: Path, tmp_path: Path) -> None:
    config = settings(road, tmp_path / "run", **PACKED)
    train(replace(config, output=str(tmp_path / "never")))
    train(replace(config, steps=2, lr_decay_steps=4))
    with pytest.raises(ValueError, match="run: was begun with pack True, now False"):
        train(replace(config, pack=False, resume=True))
    train(replace(config, resume=True))
    assert losses(tmp_path / "run") == losses(tmp_path / "never")
    assert digest(open_checkpoint(tmp_path / "run")) == digest(open_checkpoint(tmp_path / "never"))


def test_an_epoch_counts_rows_and_the_run_says_how_full_they_are(
    road: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = len(pack(open_instruction_data(road / "data"), LENGTH))
    summary = train(settings(road, tmp_path / "run", pack=True, seq_length=LENGTH, steps=1, epochs=1.0))
    assert summary["steps"] == -(-rows // 8)
    assert re.search(rf"packed 60 samples into {rows} rows of {LENGTH} tokens, 9\d\.\d% full\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_type": "text"}, "pack is for short samples, and data_type text is cut to full ones; leave pack out"),
        ({"cp": 2}, "pack keeps samples apart on one process, and cp 2 cuts them up; give one of them"),
    ],
)
def test_where_packing_makes_no_sense_it_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(pack=True, **changes)
