"""DeepSpeed as the engine: our losses with ZeRO-1, -2 and -3, the published settings as they are, saved and resumed as ours."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from test_resume import optimizer_tensors
from train_makers import MODEL, losses, records, settings, train_all

from pyalpaca.checkpoint import digest, memory_reader, open_checkpoint, write_native
from pyalpaca.parallel import Mesh
from pyalpaca.train import TrainConfig, deepspeed_engine, train
from pyalpaca.train.deepspeed_config import deepspeed_config
from pyalpaca.train.deepspeed_engine import check_deepspeed
from pyalpaca.train.loop import plan

installed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

PUBLISHED: dict[str, Any] = {
    "fp16": {
        "enabled": True,
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 8,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "optimizer": {"type": "Adam"},
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 1e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 1e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": 8,
    "train_batch_size": 256,
    "train_micro_batch_size_per_gpu": 4,
    "zero_allow_untested_optimizer": True,
}
RECIPE = TrainConfig(
    engine="deepspeed",
    deepspeed_config="-",
    micro_batch_size=4,
    global_batch_size=256,
    dtype="fp16",
    loss_scale=256.0,
    loss_scale_window=1000,
    lr=1e-6,
)


def written(folder: Path, **values: Any) -> str:
    path = folder / f"ds{len(list(folder.glob('ds*.json')))}.json"
    path.write_text(json.dumps(values))
    return str(path)


def with_deepspeed(config: TrainConfig, folder: Path, stage: int, **more: Any) -> TrainConfig:
    # Small buckets and no persistent parameters: what real sizes do.
    zero = {"stage": stage, "reduce_bucket_size": 4000, "allgather_bucket_size": 4000, "stage3_param_persistence_threshold": 0}
    file = written(folder, zero_optimization=zero, **more)
    return replace(config, engine="deepspeed", deepspeed_config=file, output=f"{config.output}-z{stage}")


@installed
def test_ten_steps_on_two_processes_have_our_losses(road: Path, tmp_path: Path) -> None:
    full = settings(road, tmp_path / "full", steps=10, clip=0.9)
    lora = replace(full, output=str(tmp_path / "lora"), lora_r=2, lora_dropout=0.2, recompute="selective")
    again = replace(full, output=str(tmp_path / "again"), recompute="full", micro_batch_size=1)
    runs = [with_deepspeed(config, tmp_path, stage) for config in (full, lora, again) for stage in (1, 2, 3)]
    for config in (full, lora, again):
        train(config)
    launch(2, train_all, runs)
    for run in runs:
        ours = records(Path(run.output[:-3]))
        theirs = records(Path(run.output))
        for key in ("loss", "grad_norm", "learning_rate"):
            assert [r[key] for r in theirs] == pytest.approx([r[key] for r in ours], abs=1e-5), (run.output, key)
        expected, found = optimizer_tensors(Path(run.output[:-3])), optimizer_tensors(Path(run.output))
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value), atol=1e-5, rtol=1e-3)
        whole, copy = open_checkpoint(run.output[:-3]), open_checkpoint(run.output)
        for name in whole.names:
            torch.testing.assert_close(copy.read(name), whole.read(name), atol=2e-4, rtol=1e-3)


@installed
@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(2, "bf16"), (3, "fp32"), pytest.param(2, "fp32", marks=pytest.mark.long), pytest.param(3, "bf16", marks=pytest.mark.long)],
)
def test_a_resumed_run_is_bit_identical_and_any_engine_goes_on(road: Path, tmp_path: Path, stage: int, dtype: str) -> None:
    usual = settings(road, tmp_path / "run", dtype=dtype, lora_r=3, lora_dropout=0.1, lr_decay_steps=6, steps=3)
    config = with_deepspeed(usual, tmp_path, stage)
    never, stopped, ours, native = (
        replace(config, output=str(tmp_path / name)) for name in ("never", "stopped", "ours", "native")
    )
    launch(2, train_all, [replace(never, steps=6), stopped, ours])
    train(replace(native, engine="native", deepspeed_config=""))
    launch(2, train_all, [replace(stopped, steps=6, resume=True), replace(native, steps=6, resume=True)])
    train(replace(ours, engine="native", deepspeed_config="", steps=6, resume=True))
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in records(tmp_path / "stopped")] == [r[key] for r in records(tmp_path / "never")]
    assert digest(open_checkpoint(tmp_path / "stopped")) == digest(open_checkpoint(tmp_path / "never"))
    assert optimizer_tensors(tmp_path / "stopped") == optimizer_tensors(tmp_path / "never")
    close = 1e-5 if dtype == "fp32" else 5e-3
    for name in ("ours", "native"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "never"), abs=close)


def fp16(configs: list[TrainConfig]) -> None:
    """As train_all; DeepSpeed refuses fp16 on processors without instructions for it, torch computes it."""
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    train_all(configs)


@installed
def test_the_published_settings_run_as_they_are_and_overflows_are_handled_as_ours(road: Path, tmp_path: Path) -> None:
    usual = settings(road, tmp_path / "ours", dtype="fp16", lora_r=2, steps=5, micro_batch_size=4, global_batch_size=16, lr=1e-3)
    first = replace(usual, loss_scale=256.0, loss_scale_window=1000)
    published = {**PUBLISHED, "train_batch_size": 16, "gradient_accumulation_steps": 2}
    file = written(tmp_path, **published)
    theirs = replace(first, engine="deepspeed", deepspeed_config=file, output=str(tmp_path / "theirs"))
    # From a scale that overflows in every dtype: the first overflow only uses the tracker up.
    high = replace(usual, loss_scale=2.0**40, hysteresis=2, loss_scale_window=2, output=str(tmp_path / "high"))
    skipping = with_deepspeed(high, tmp_path, 2)
    launch(2, train_all, [first, high])
    launch(2, fp16, [theirs, skipping])
    assert losses(tmp_path / "theirs") == pytest.approx(losses(tmp_path / "ours"), abs=2e-2)
    for key in ("loss_scale", "skipped", "learning_rate"):
        assert [r[key] for r in records(tmp_path / "high-z2")] == [r[key] for r in records(tmp_path / "high")]
    assert [r["loss_scale"] for r in records(tmp_path / "high")] == [2.0**40, 2.0**40, 2.0**39, 2.0**38, 2.0**37]


def diverging(configs: list[TrainConfig]) -> list[str]:
    said = []
    for config in configs:
        try:
            train(config)
            said.append("")
        except (FloatingPointError, ValueError) as error:
            said.append(str(error))
    return said


@installed
def test_what_is_not_finite_stops_the_run_or_leaves_the_weights(road: Path, tmp_path: Path) -> None:
    reader = open_checkpoint(road / "hf")
    tensors = {name: reader.read(name).clone() for name in reader.names}
    tensors["lm_head.weight"][0, 0] = float("nan")
    write_native(memory_reader(MODEL, tensors), tmp_path / "model")
    usual = settings(road, tmp_path / "run", model=str(tmp_path / "model"), steps=1)
    stop = [with_deepspeed(usual, tmp_path, stage) for stage in (2, 3)]
    skip = [replace(config, on_nan="skip", output=f"{config.output}-skip") for config in stop]
    tied = replace(stop[0], tp=2, output=str(tmp_path / "tied"))
    for said in launch(2, diverging, [*stop, *skip, tied]):
        assert all(message.startswith("step 1: loss nan, gradient norm inf; DeepSpeed found") for message in said[:2])
        assert said[2:4] == ["", ""] and "data-parallel only" in said[4]
    for config in skip:
        assert records(Path(config.output))[0]["nan_steps"] == 1
        assert digest(open_checkpoint(config.output)) == digest(open_checkpoint(tmp_path / "model"))


def test_the_published_settings_agree_with_the_recipe(tmp_path: Path) -> None:
    found = deepspeed_config(replace(RECIPE, deepspeed_config=written(tmp_path, **PUBLISHED)), data_parallel=8)
    assert found["zero_optimization"] == PUBLISHED["zero_optimization"]
    assert found["fp16"]["enabled"] and not found["bf16"]["enabled"] and "optimizer" not in found
    assert (found["gradient_accumulation_steps"], found["gradient_clipping"]) == (8, RECIPE.clip)


def test_auto_and_what_is_missing_are_filled_in(tmp_path: Path) -> None:
    file = written(
        tmp_path, zero_optimization={"stage": 1}, fp16={"enabled": "auto", "hysteresis": "auto"}, train_batch_size="auto"
    )
    found = deepspeed_config(replace(RECIPE, dtype="bf16", deepspeed_config=file), data_parallel=4)
    assert not found["fp16"]["enabled"] and found["bf16"]["enabled"]
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"]) == (256, 4)
    assert found["gradient_accumulation_steps"] == 16


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"train_batch_size": 128},
        "train_batch_size is 128, but the run's settings make it 256; change one of them \\(--global-batch",
    ),
    ({"fp16": {"enabled": False}}, r"fp16.enabled is false, but the run's settings make it true; change one of them \(--dtype\)"),
    ({"fp16": {"initial_scale_power": 16}}, "fp16.initial_scale_power is 16, but the run's settings make it 8.0"),
    ({"fp16": {"loss_scale": 128}}, "fp16.loss_scale is 128, but"),
    ({"gradient_clipping": 0.5}, r"gradient_clipping is 0.5, but the run's settings make it 1.0; change one of them \(--clip\)"),
    ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0, expected 1, 2 or 3"),
    ({"zero_optimization": 2}, "zero_optimization is 2, expected an object"),
    ({"optimizer": {"type": "Lamb"}}, "optimizer.type is 'Lamb', expected AdamW"),
    ({"optimizer": {"type": "Adam", "params": {"lr": 1.0}}}, "optimizer.params.lr is 1.0, but"),
    ({"optimizer": {"type": "Adam", "params": {"amsgrad": True}}}, "optimizer.params has 'amsgrad'"),
    ({"scheduler": {"type": "WarmupLR"}}, "has a section 'scheduler', which is pyalpaca's to decide"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_file_that_contradicts_the_settings_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = written(tmp_path, **{**PUBLISHED, **change})
    with pytest.raises(ValueError, match=f"ds0.json: {message}"):
        deepspeed_config(replace(RECIPE, deepspeed_config=file), data_parallel=8)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.json: not found, expected a JSON file for DeepSpeed"):
        deepspeed_config(replace(RECIPE, deepspeed_config=str(tmp_path / "none.json")), 1)
    for text, message in (("{", "is not JSON"), ("[]", "holds list, expected an object")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            deepspeed_config(replace(RECIPE, deepspeed_config=str(tmp_path / "bad.json")), 1)


def test_what_deepspeed_can_not_serve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    setup = plan(MODEL, RECIPE, Mesh(cpu))
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="wants its processes from torchrun"):
        check_deepspeed(setup)
    with pytest.raises(ValueError, match="data-parallel only, but tp is 2, cp 1 and pp 1"):
        check_deepspeed(replace(setup, mesh=Mesh(cpu, tp=2)))
    with pytest.raises(ValueError, match="zero is given with engine deepspeed"):
        check_deepspeed(replace(setup, config=replace(RECIPE, zero=1)))
    with pytest.raises(ValueError, match="ties its embeddings"):
        check_deepspeed(replace(setup, model=replace(MODEL, tie_embeddings=True)))
    for changes in ({"deepspeed_config": ""}, {"engine": "native"}):
        with pytest.raises(ValueError, match="belong together"):
            replace(RECIPE, **changes)


def test_without_deepspeed_one_sentence_says_what_to_install(road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_engine, "find_spec", lambda name: None)
    monkeypatch.setenv("RANK", "0")
    file = written(tmp_path, zero_optimization={"stage": 2})
    with pytest.raises(ValueError, match="DeepSpeed is not installed: pip install deepspeed, or give --engine native"):
        train(settings(road, tmp_path / "run", engine="deepspeed", deepspeed_config=file))
    assert not (tmp_path / "run").exists()
