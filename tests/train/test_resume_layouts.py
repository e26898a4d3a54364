"""A run that stopped goes on to the bit in every tp x pp x dp of up to 4 ranks and under every schedule, and elsewhere to 1e-5.

It stops in the middle of an epoch and goes on into the next one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from train_makers import losses, records, settings, train_all

from pyalpaca.checkpoint import digest, memory_reader, native_tensors, open_checkpoint, write_native
from pyalpaca.model import LlamaConfig, flatten, init, parameters
from pyalpaca.train import TrainConfig, train

# 3 divides its heads and feed-forward width as well as 4 does.
MODEL = LlamaConfig(
    vocab_size=421, hidden_size=48, intermediate_size=96, num_layers=4, num_heads=12, num_kv_heads=12, head_dim=8, norm_eps=1e-5
)
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_r": 2, "lora_dropout": 0.2, "recompute": "selective", "lora_full": "lm_head"},
}
LAYOUTS = [(tp, pp, dp) for tp in range(1, 5) for pp in range(1, 5) for dp in range(1, 5) if tp * pp * dp <= 4]
SCHEDULES: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2 sp": (2, {"tp": 2, "sequence_parallel": True}),
    "cp2": (2, {"cp": 2}),
    "pp2 interleaved": (2, {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}),
    "pp2 zb-h1 uneven": (2, {"pp": 2, "schedule": "zb-h1", "layers_per_stage": "1,3"}),
    "tp2 sp pp2 zb-h1": (4, {"tp": 2, "pp": 2, "sequence_parallel": True, "schedule": "zb-h1"}),
}
ALL: dict[str, tuple[int, dict[str, Any]]] = {
    **{
        f"tp{tp} pp{pp} dp{dp}": (tp * pp * dp, {"tp": tp, "pp": pp, "zero": int(dp == 2), "micro_batch_size": 2 + (dp != 3)})
        for tp, pp, dp in LAYOUTS
    },
    **SCHEDULES,
}


@pytest.fixture(scope="module")
def wide(road: Path) -> TrainConfig:
    """Four steps of one process; 36 samples are an epoch, 12 a step."""
    fresh = flatten(init(parameters(MODEL), seed=5))
    tensors = {p.name: fresh[p.path] * (4 if fresh[p.path].dim() > 1 else 1) for p in parameters(MODEL)}
    write_native(memory_reader(MODEL, tensors, road / "tokenizer"), road / "wide")
    sizes = {"global_batch_size": 12, "micro_batch_size": 3, "seq_length": 32, "split": "36,2,0"}
    return settings(road, Path(), model=str(road / "wide"), save_every=2, peak_tflops=1.0, **sizes)


def stop_at_2(run: Path, copy: Path) -> None:
    """The folder of a run as it was when its first checkpoint had been written, at step 2 of 4."""
    shutil.copytree(run, copy, symlinks=True, ignore=shutil.ignore_patterns("step_0000004"))
    (copy / "latest").write_text("step_0000002\n")


def everything(run: Path) -> Iterator[tuple[str, list[Any]]]:
    """What a run has come to: its records but for the times, its weights, its optimizer's state."""
    for key in ("step", "loss", "grad_norm", "learning_rate", "samples"):
        yield key, [r[key] for r in records(run)]
    yield "weights", [digest(open_checkpoint(run))]
    tensors = native_tensors(run, "optimizer")
    for name in sorted(tensors.shapes):
        yield name, tensors.read(name, None).flatten().tolist()


@pytest.mark.filterwarnings("ignore:.*have no answer")
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_layout_goes_on_to_the_bit(wide: TrainConfig, tmp_path: Path, world: int, kind: str) -> None:
    base = replace(wide, output=str(tmp_path / "alone"), **KINDS[kind])
    train(base)
    layouts = {name: replace(base, **changes) for name, (processes, changes) in ALL.items() if processes == world}
    assert layouts
    evaluated = pytest.approx(records(tmp_path / "alone")[-1]["valid_loss"], abs=1e-5)
    runs = {name: [tmp_path / name / kind for kind in ("never", "stopped", "elsewhere")] for name in layouts}
    launch(world, train_all, [replace(config, output=str(runs[name][0])) for name, config in layouts.items()])
    for never, *others in runs.values():
        for run in others:
            stop_at_2(never, run)
    launch(world, train_all, [replace(config, output=str(runs[name][1]), resume=True) for name, config in layouts.items()])
    for name, (never, stopped, elsewhere) in runs.items():
        for (key, expected), (_, found) in zip(everything(never), everything(stopped), strict=True):
            assert found == expected, (name, key)
        train(replace(base, output=str(elsewhere), resume=True))
        assert records(never)[-1]["valid_loss"] == evaluated, name
        for run in (never, elsewhere):
            assert losses(run) == pytest.approx(losses(Path(base.output)), abs=1e-5), (name, run.name)
