"""The state as files: every rank writes what it owns, beside the training; the folder takes its name when all is on the disk.

A save copies the state to host memory; a thread then writes, hashes and flushes it, and the ranks' threads agree on the
outcome: rank 0 names the folder, points `latest` at it and removes the oldest. Whenever the run is killed, `latest` names a
whole checkpoint. A save that fails, a full disk say, ends the run with one sentence at the end of the step in which it is
known; what it has written is removed and the checkpoints before it stay.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from pyalpaca.checkpoint import (
    DamagedError,
    find_native,
    native_steps,
    native_tensors,
    read_native_meta,
    write_latest,
    write_native_manifest,
    write_native_shard,
)
from pyalpaca.files import PARTIAL, sync
from pyalpaca.model import Parameter, flatten, load, shard
from pyalpaca.parallel import gather_objects, host_group, tell
from pyalpaca.train.optimizer import OptimizerState, updated_place, zero_ranks
from pyalpaca.train.schedule import LossScale
from pyalpaca.train.step import Setup, TrainState

_MOMENTS = ("exp_avg", "exp_avg_sq", "master")
_TREES = ("params", "optimizer", "loss_scale")
_COUNTERS = tuple(f.name for f in dataclasses.fields(TrainState) if f.name not in _TREES)

Shard = dict[str, tuple[Tensor, tuple[int, ...], Any]]


@dataclasses.dataclass(frozen=True)
class _Job:
    """What this rank writes of one state. shards: {kind: {canonical name: (tensor, shape of the whole, piece)}}."""

    name: str
    shards: dict[str, Shard]
    meta: dict[str, Any]
    links: tuple[str, ...]


class Saver:
    """Writes a run's checkpoints, one at a time; every rank must make it and call `save` at the same steps.

    Leaving its context waits for the last save.
    """

    def __init__(self, run: Path, setup: Setup) -> None:
        self._run, self._setup = run, setup
        self._group = host_group(setup.config.timeout)
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def save(self, state: TrainState, *links: str) -> Path:
        """Write run/step_XXXXXXX, point `latest` at it and delete all but the newest `keep`.

        With save_async the state is copied and the rest done by a thread: the folder is there after `wait`. Waits for the save
        before, whose error it raises. links: names such as `best`, which become links to this step and keep it from deletion.
        """
        self.wait()
        behind = self._setup.config.save_async
        job = _job(state, self._setup, links, copy=behind)
        if behind:
            self._thread = Thread(target=self._write, args=(job,), name="save", daemon=True)
            self._thread.start()
        else:
            self._write(job)
            self.wait()
        return self._run / job.name

    @property
    def failed(self) -> bool:
        """Whether the save that is under way has already come to a bad end; `wait` then raises why."""
        return self._error is not None

    def wait(self) -> None:
        """Return when the last save is on the disk; raises its error, which is the same on every rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            # Another error is on its way. If it is another rank's death, that rank's share will not come.
            self._thread.join(5.0 if issubclass(kind, ConnectionError) else None)
            if self._error is not None:
                print(f"warning: {self._error}", file=sys.stderr)

    def _write(self, job: _Job) -> None:
        partial, mine, entries = self._run / f"{job.name}{PARTIAL}", "", []
        rank, mesh = self._setup.mesh.rank, self._setup.mesh
        try:
            try:
                partial.mkdir(parents=True, exist_ok=True)
                where = f"tp{mesh.tp_rank:02d}-pp{mesh.pp_rank:02d}"
                if zero_ranks(mesh, self._setup.config) > 1:
                    where += f"-dp{mesh.replica_rank:02d}"
                for kind, tensors in job.shards.items():
                    entries += write_native_shard(partial, where, tensors, kind)
            except Exception as error:  # the others wait to hear of it
                mine = self._sentence(job, error)
            gathered = tell((mine, entries), self._group)
            bad = next((message for message, _ in gathered if message), "")
            if rank == 0:
                try:
                    if not bad:
                        self._commit(job, partial, [entry for _, part in gathered for entry in part])
                except Exception as error:
                    bad = self._sentence(job, error)
                shutil.rmtree(partial, ignore_errors=True)  # gone if all went well: it took its name
            bad = tell(bad, self._group)[0]
            if bad:
                self._error = OSError(bad)
        except Exception as error:
            self._error = error

    def _sentence(self, job: _Job, error: Exception) -> str:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return (
            f"{self._run / job.name}: rank {self._setup.mesh.rank} could not save it ({reason}); the checkpoints before it are "
            "whole: see that the disk has room, then go on with --resume"
        )

    def _commit(self, job: _Job, partial: Path, entries: list[dict[str, Any]]) -> None:
        write_native_manifest(partial, self._setup.model, entries, job.meta)
        sync(partial)
        final = self._run / job.name
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(self._run)
        write_latest(self._run, final.name)
        for link in job.links:
            new = self._run / f"{link}{PARTIAL}"
            new.unlink(missing_ok=True)
            new.symlink_to(final.name)
            os.replace(new, self._run / link)
        # A later step can lie there if a run died before `latest` named it; it must not push this one out.
        linked = {os.readlink(path) for path in self._run.iterdir() if path.is_symlink()}
        for old in native_steps(self._run)[self._setup.config.keep :]:
            if old.name not in linked:
                shutil.rmtree(old)


def _job(state: TrainState, setup: Setup, links: tuple[str, ...], copy: bool) -> _Job:
    meta = {
        **{name: getattr(state, name) for name in _COUNTERS},
        "loss_scale": dataclasses.asdict(state.loss_scale),
        "train_config": dataclasses.asdict(setup.config),
    }
    shards: dict[str, Shard] = {}
    mesh, config = setup.mesh, setup.config
    if mesh.replica_rank == 0:
        shards["model"] = _owned(flatten(state.params), setup, "", copy, lambda p: shard(p, mesh.tp_rank, mesh.tp))
    if mesh.replica_rank == 0 or zero_ranks(mesh, config) > 1:
        shards["optimizer"] = {}
        for kind in _MOMENTS:
            values = getattr(state.optimizer, kind)
            shards["optimizer"].update(_owned(values, setup, f"{kind}.", copy, lambda p: updated_place(p, mesh, config)))
    return _Job(f"step_{state.step:07d}", shards, meta, links)


def _owned(values: dict[str, Tensor], setup: Setup, prefix: str, copy: bool, place: Callable[[Parameter], Any]) -> Shard:
    """{canonical name: (tensor, whole shape, piece)} of what this rank owns, as it is or copied to host memory."""
    mesh = setup.mesh
    result: Shard = {}
    for path, tensor in values.items():
        p = setup.table[path]
        if p.dim is not None or mesh.tp_rank == 0:
            tensor = tensor.detach()
            held = tensor.to("cpu", copy=True) if copy else tensor
            result[prefix + p.name] = (held, p.shape, place(p))
    return result


def save(state: TrainState, setup: Setup, run: Path) -> Path:
    """Write run/step_XXXXXXX at once, see Saver; every rank must call it."""
    with Saver(run, setup) as saver:
        return saver.save(state)


def tidy(run: Path) -> None:
    """Remove what a save that was killed has left in a run folder."""
    for partial in run.glob(f"step_*{PARTIAL}"):
        shutil.rmtree(partial)


def begun(run: Path) -> bool:
    """Whether a run folder holds checkpoints, be they damaged."""
    return (run / "latest").exists() or bool(native_steps(run))


def restore(run: Path, setup: Setup, dtype: torch.dtype) -> TrainState:
    """The state that `run`'s last good checkpoint holds, cut for this mesh, which need not be the one that wrote it.

    A checkpoint that is damaged, on any rank's part, is named on stderr, put aside as step_XXXXXXX.damaged, and the one before
    it is tried. Every rank must call it. ValueError if none is good, or if it was trained on other parameters (another LoRA
    rank, say).
    """
    try:
        latest = find_native(run)
    except DamagedError as error:
        _say(setup, str(error))
        latest = None
    steps = native_steps(run)
    for step in steps:
        try:
            state, problem = _restore(step, setup, dtype), ""
        except DamagedError as error:
            state, problem = None, str(error)
        problem = next(filter(None, gather_objects(problem)), "")
        if state is not None and not problem:
            if setup.mesh.rank == 0 and step != latest:
                write_latest(run, step.name)
            return state
        _say(setup, problem)
        if setup.mesh.rank == 0 and step != steps[-1]:
            _put_aside(step)
    raise ValueError(f"{run}: none of its {len(steps)} checkpoints is whole; restore one or begin another run with --output")


def _say(setup: Setup, problem: str) -> None:
    if setup.mesh.rank == 0:
        print(f"warning: {problem}", file=sys.stderr)


def _put_aside(step: Path) -> None:
    """Leave a damaged checkpoint to be looked at, where it neither counts as one of those to keep nor is taken for one."""
    aside = step.with_name(f"{step.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    step.rename(aside)


def _restore(step: Path, setup: Setup, dtype: torch.dtype) -> TrainState:
    model, optimizer, meta = native_tensors(step, "model"), native_tensors(step, "optimizer"), read_native_meta(step)
    for p in setup.table.values():
        found = model.shapes.get(p.name)
        if found != p.shape:
            raise ValueError(
                f"{model.path}: {p.name} is {found or 'missing'}, this run expects {p.shape}; resume with that run's settings"
            )

    mesh = setup.mesh
    params = load(setup.table.values(), lambda p, piece: model.read(p.name, piece), dtype, mesh.device, mesh.tp_rank, mesh.tp)
    learned = [p for path, p in setup.table.items() if path in setup.trainable]

    device = mesh.device if setup.config.engine == "native" else "cpu"  # of which DeepSpeed takes its shares

    def moments(kind: str) -> dict[str, Tensor]:
        held = [p for p in learned if f"{kind}.{p.name}" in optimizer.shapes]
        pieces = {p.path: optimizer.read(f"{kind}.{p.name}", updated_place(p, mesh, setup.config)) for p in held}
        return {path: t.to(device, torch.float32, copy=True) for path, t in pieces.items()}

    found_moments = OptimizerState(*(moments(kind) for kind in _MOMENTS))
    if len(found_moments.exp_avg) != len(learned) or (dtype != torch.float32) != bool(found_moments.master):
        raise ValueError(
            f"{optimizer.path}: the optimizer state is that of another run; resume with its trainable parameters and dtype"
        )
    counters = {name: meta[name] for name in _COUNTERS if name in meta}
    return TrainState(params, found_moments, LossScale(**meta["loss_scale"]), **counters)
