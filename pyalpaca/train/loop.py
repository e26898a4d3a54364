"""A training run: open what the settings name, step, evaluate, record, save."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from pyalpaca.checkpoint import copy_tokenizer, open_checkpoint
from pyalpaca.data import Data, PackedData, batch, batch_starts
from pyalpaca.files import atomic_file
from pyalpaca.model import parameters
from pyalpaca.parallel import Traffic, count_traffic, gather_objects, init_mesh
from pyalpaca.train.config import TrainConfig
from pyalpaca.train.engine import Engine, open_engine
from pyalpaca.train.evaluate import Best, best_of, evaluate, next_best
from pyalpaca.train.faults import Guard, began_here
from pyalpaca.train.fit import check_fits
from pyalpaca.train.journal import Record, journal, keep_records, silent
from pyalpaca.train.metrics import rates
from pyalpaca.train.peaks import memory_bytes, peak_tflops
from pyalpaca.train.prepare import DTYPES, Shares, check_same_data, count_steps, micro_batches, open_data, plan, start, words
from pyalpaca.train.saving import begun, restore, tidy
from pyalpaca.train.step import Setup, TrainState, train_step
from pyalpaca.train.table import markdown_table, performance_row, throughput
from pyalpaca.train.trackers import require_trackers

__all__ = ["open_data", "plan", "start", "train"]


def train(config: TrainConfig) -> dict[str, Any]:
    """Run the training that `config` describes; returns its summary (on every rank).

    A SIGTERM, or a first SIGINT, lets the running step end, saves, and returns with its number as `signal` in the summary.
    Writes {output}/metrics.jsonl (one record a step), {output}/train.json (the settings), {output}/step_XXXXXXX, and where
    something is evaluated {output}/best.
    ValueError before anything is written for settings, model and data that do not fit together.
    """
    mesh = init_mesh(config.tp, config.pp, config.timeout, config.cp)
    micro_batches(config, mesh)
    require_trackers(config)
    reader = open_checkpoint(config.model, lora=words(config.lora), vocab_size=config.vocab_size or None)
    shares = open_data(config, reader.config.vocab_size, mesh)
    config = count_steps(config, len(shares.train))
    setup, run = plan(reader.config, config, mesh), Path(config.output)
    go_on = begun(run)
    if go_on and not config.resume and not began_here(run):
        raise ValueError(f"{run}: holds the checkpoints of a run; give --resume to go on with it, or another --output")
    if not go_on and run.resolve() == Path(config.model).resolve():
        raise ValueError(f"{run}: is the folder of the model itself; give another --output")
    if go_on:
        check_same_data(run, config, shares.fingerprint)
    check_fits(config, reader.config, mesh)
    state = restore(run, setup, DTYPES[config.dtype]) if go_on else start(config, setup, reader)
    engine, state = open_engine(state, setup, lambda *given: train_step(*given))
    kept: list[Record] = []
    size = sum(math.prod(p.shape) for p in parameters(reader.config))
    settings = {**dataclasses.asdict(config), "devices": mesh.world, "device": mesh.device.type, "parameters": size}
    if mesh.rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        tidy(run)
        copy_tokenizer(reader.tokenizer, run)
        kept = keep_records(run / "metrics.jsonl", state.step)
        with atomic_file(run / "train.json") as partial:
            partial.write_text(json.dumps({**settings, "data_fingerprint": shares.fingerprint}, indent=1) + "\n")
    first, best = state.step, gather_objects(best_of(kept))[0]
    records, best, stop = _run(state, setup, engine, shares, best, run)
    if not records:
        if mesh.rank == 0:
            print(_nothing_left(run, first, best, config))
        return {"steps": 0}
    summary = _summary(records, setup, best)
    if stop:
        summary["signal"] = stop
    if mesh.rank == 0:
        print(markdown_table([performance_row(summary, settings)]))
    return summary


def _run(
    state: TrainState, setup: Setup, engine: Engine, shares: Shares, best: Best, run: Path
) -> tuple[list[Record], Best, int]:
    """The loop: the records of the steps that were done, the best evaluation, and the signal that ended it early, or 0."""
    config, mesh, records, stop = setup.config, setup.mesh, [], 0
    peak = config.peak_tflops or peak_tflops(mesh.device)
    with Guard(run, setup, state.step) as guard, journal(config, run, state.step) if mesh.rank == 0 else silent() as write:
        while state.step < config.steps and not stop and not _patience_lost(best, config):
            state, record = _step(state, setup, engine, shares.train, peak)
            last, better = state.step == config.steps, False
            if len(shares.valid) and (last or (config.eval_every and state.step % config.eval_every == 0)):
                with engine.weights(state) as params:
                    record["valid_loss"], record["valid_tokens"] = evaluate(params, shares.valid, setup)
                best = next_best(best, state.step, record["valid_loss"])
                better, last = best.step == state.step, last or _patience_lost(best, config)
            if last and len(shares.test):
                with engine.weights(state) as params:
                    record["test_loss"], record["test_tokens"] = evaluate(params, shares.test, setup)
            records.append(record)
            write(record)
            marks = ["best"] if better and config.keep_best else []
            stop = guard.end_step(state)
            if last or marks or stop or (config.save_every and state.step % config.save_every == 0):
                guard.save(engine.whole(state), *marks)
    return records, best, stop


def _step(state: TrainState, setup: Setup, engine: Engine, data: Data, peak: float) -> tuple[TrainState, Record]:
    """One step on the batch that is due, and its record."""
    config, mesh = setup.config, setup.mesh
    began, rows = time.perf_counter(), config.global_batch_size // mesh.dp
    mine = slice(mesh.dp_rank * rows, (mesh.dp_rank + 1) * rows)
    found = batch(data, state.samples, config.global_batch_size, config.seed, config.seq_length, config.pad_to or "length", mine)
    tokens, labels = (x.to(mesh.device).unflatten(0, (-1, config.micro_batch_size)) for x in found)
    starts = None
    if isinstance(data, PackedData):
        starts = batch_starts(data, state.samples, config.global_batch_size, config.seed, mine)
    counting: AbstractContextManager[Traffic] = count_traffic(mesh) if config.count_bytes else nullcontext({})
    with counting as moved:
        state, metrics = engine.step(state, tokens, labels, setup, starts)
    seconds = time.perf_counter() - began
    record = {
        **dataclasses.asdict(metrics),
        "step": state.step,
        "samples": state.samples,
        "seconds": seconds,
        "global_batch_size": config.global_batch_size,
        "seq_length": tokens.shape[-1],
        "skipped": state.step - state.updates - state.nan_steps,
        "nan_steps": state.nan_steps,
        **rates(config, tokens.shape[-1], setup.model, seconds, mesh.world, peak),
        "memory_bytes": memory_bytes(mesh.device),
        **{f"moved_{axis}_{collective}": count for (axis, collective), count in sorted(moved.items())},
    }
    return state, record


def _patience_lost(best: Best, config: TrainConfig) -> bool:
    return bool(config.patience) and best.since >= config.patience


def _nothing_left(run: Path, steps: int, best: Best, config: TrainConfig) -> str:
    if _patience_lost(best, config):
        return f"{run}: stopped at step {steps}, {best.since} evaluations after its best at step {best.step}; raise --patience"
    return f"{run}: has done {steps} steps and {config.steps} are asked for, so nothing is left to do; raise --steps"


def _summary(records: list[Record], setup: Setup, best: Best) -> dict[str, Any]:
    """What a run has come to, the same on every rank."""
    summary = {"steps": len(records), "loss_first": records[0]["loss"], "loss_last": records[-1]["loss"]}
    if best.step:
        summary |= {"valid_loss_best": best.loss, "best_step": best.step}
    summary |= {key: records[-1][key] for key in ("valid_loss", "test_loss") if key in records[-1]}
    # Every rank has timed its own steps, and measured its own peak: the first one's count.
    summary |= gather_objects(throughput(records, setup.mesh.world))[0]
    summary["memory_bytes"] = max(gather_objects(records[-1]["memory_bytes"]))
    if records[-1]["step"] < setup.config.steps:
        summary["stopped_early"] = True
    return summary
