"""The state as files: every rank writes what it owns, the folder takes its name when all of it is on the disk."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyalpaca.checkpoint import (
    native_tensors,
    read_native_meta,
    write_latest,
    write_native_manifest,
    write_native_shard,
)
from pyalpaca.files import PARTIAL, sync
from pyalpaca.model import Parameter, flatten, load, shard
from pyalpaca.parallel import barrier, gather_objects
from pyalpaca.train.optimizer import OptimizerState
from pyalpaca.train.schedule import LossScale
from pyalpaca.train.step import Setup, TrainState

_MOMENTS = ("exp_avg", "exp_avg_sq", "master")


def save(state: TrainState, setup: Setup, run: Path) -> Path:
    """Write run/step_XXXXXXX, point `latest` at it and delete all but the newest `keep`; every rank must call it."""
    mesh, name = setup.mesh, f"step_{state.step:07d}"
    partial = run / f"{name}{PARTIAL}"
    try:
        _write(state, setup, run, partial)
    finally:
        if mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # gone if all went well: it took its name
    barrier()
    return run / name


def _write(state: TrainState, setup: Setup, run: Path, partial: Path) -> None:
    mesh = setup.mesh
    if mesh.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    entries: list[dict[str, Any]] = []
    if mesh.dp_rank == 0:
        own = {path: p for path, p in setup.table.items() if p.dim is not None or mesh.tp_rank == 0}
        where = f"tp{mesh.tp_rank:02d}-pp{mesh.pp_rank:02d}"

        def placed(values: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
            """{canonical name: (tensor, whole shape, piece)} of what this rank owns."""
            mine = {own[path]: t.detach() for path, t in values.items() if path in own}
            return {prefix + p.name: (t, p.shape, shard(p, mesh.tp_rank, mesh.tp)) for p, t in mine.items()}

        entries += write_native_shard(partial, where, placed(flatten(state.params)), "model")
        moments: dict[str, Any] = {}
        for kind in _MOMENTS:
            moments.update(placed(getattr(state.optimizer, kind), f"{kind}."))
        entries += write_native_shard(partial, where, moments, "optimizer")
    gathered = gather_objects(entries)
    if mesh.rank == 0:
        meta = {
            "step": state.step,
            "updates": state.updates,
            "samples": state.samples,
            "nan_steps": state.nan_steps,
            "loss_scale": dataclasses.asdict(state.loss_scale),
            "train_config": dataclasses.asdict(setup.config),
        }
        write_native_manifest(partial, setup.model, [e for part in gathered for e in part], meta)
        sync(partial)
        final = partial.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        write_latest(run, final.name)
        # A later step can lie there if a run died before `latest` named it; it must not push this one out.
        steps = sorted(p for p in run.iterdir() if re.fullmatch(r"step_\d+", p.name) and p.name <= final.name)
        for old in steps[: -setup.config.keep]:
            shutil.rmtree(old)


def tidy(run: Path) -> None:
    """Remove what a save that was killed has left in a run folder."""
    for partial in run.glob(f"step_*{PARTIAL}"):
        shutil.rmtree(partial)


def restore(run: Path, setup: Setup, dtype: torch.dtype) -> TrainState:
    """The state that `run`'s newest checkpoint holds, cut for this mesh, which need not be the one that wrote it.

    ValueError if it was trained on other parameters (another LoRA rank, say).
    """
    model, optimizer, meta = native_tensors(run, "model"), native_tensors(run, "optimizer"), read_native_meta(run)
    for p in setup.table.values():
        found = model.shapes.get(p.name)
        if found != p.shape:
            raise ValueError(
                f"{model.path}: {p.name} is {found or 'missing'}, this run expects {p.shape}; resume with that run's settings"
            )

    def read(kind: str, prefix: str = "") -> Any:
        source = model if kind == "model" else optimizer
        return lambda p, piece: source.read(prefix + p.name, piece)

    mesh = setup.mesh
    params = load(setup.table.values(), read("model"), dtype, mesh.device, mesh.tp_rank, mesh.tp)
    learned = [p for path, p in setup.table.items() if path in setup.trainable]

    def moments(kind: str) -> dict[str, Tensor]:
        held: list[Parameter] = [p for p in learned if f"{kind}.{p.name}" in optimizer.shapes]
        return flatten(load(held, read("optimizer", f"{kind}."), torch.float32, mesh.device, mesh.tp_rank, mesh.tp))

    found_moments = OptimizerState(*(moments(kind) for kind in _MOMENTS))
    if len(found_moments.exp_avg) != len(learned) or (dtype != torch.float32) != bool(found_moments.master):
        raise ValueError(
            f"{optimizer.path}: the optimizer state is that of another run; resume with its trainable parameters and dtype"
        )
    counters = {k: meta[k] for k in ("step", "updates", "samples", "nan_steps")}
    return TrainState(params, found_moments, LossScale(**meta["loss_scale"]), **counters)
