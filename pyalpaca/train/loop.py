"""A training run: open what the settings name, step, log, save."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pyalpaca.checkpoint import copy_tokenizer, open_checkpoint
from pyalpaca.data import (
    Data,
    InstructionData,
    TextData,
    batch,
    open_instruction_data,
    open_text_data,
    split_instruction_data,
    split_text_data,
)
from pyalpaca.files import atomic_file
from pyalpaca.model import (
    LlamaConfig,
    Parameter,
    flatten,
    init,
    load,
    lora_parameters,
    parameters,
    shard,
    stage_parameters,
    unflatten,
)
from pyalpaca.parallel import Mesh, init_mesh, tensor_axis
from pyalpaca.train.config import TrainConfig
from pyalpaca.train.metrics import log_line, teraflops, throughput
from pyalpaca.train.optimizer import init_optimizer
from pyalpaca.train.saving import restore, save, tidy
from pyalpaca.train.schedule import LossScale
from pyalpaca.train.step import Setup, TrainState, train_step

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_data(config: TrainConfig, vocab_size: int, mesh: Mesh) -> Data:
    """The training part of the data set that the settings name.

    ValueError if it has tokens that the model does not know, or nothing to learn.
    """
    data: TextData | InstructionData
    if config.data_type == "text":
        data = split_text_data(open_text_data(config.data, config.seq_length), config.split)[0]
        tokens = data.text.tokens
    else:
        data = split_instruction_data(open_instruction_data(config.data), config.split)[0]
        tokens = data.input_ids.tokens
    if not len(data):
        raise ValueError(f"{config.data}: the split {config.split!r} leaves no sample to train on; raise its first number")
    if (largest := int(tokens.max())) >= vocab_size:
        raise ValueError(
            f"{config.data}: holds the token {largest}, but the model in {config.model} has {vocab_size} tokens; "
            "prepare the data with the model's own tokenizer"
        )
    if isinstance(data, TextData):
        return data
    silent = data.silent(config.seq_length)
    if silent == len(data):
        raise ValueError(
            f"{config.data}: none of its {len(data)} samples has an answer within {config.seq_length} tokens; raise --seq-length"
        )
    if silent and mesh.rank == 0:
        warnings.warn(
            f"{config.data}: {silent} of {len(data)} samples have no answer within {config.seq_length} tokens and teach nothing; "
            "raise --seq-length",
            stacklevel=2,
        )
    return data


def plan(model: LlamaConfig, config: TrainConfig, mesh: Mesh) -> Setup:
    """Which parameters this rank holds and which of them learn. ValueError for what the layout can't cut."""
    table = parameters(model)
    trainable = {p.path for p in table}
    if config.lora_r:
        model = replace(model, lora_scale=(config.lora_alpha or 2 * config.lora_r) / config.lora_r)
        factors = lora_parameters(table, config.lora_r, _words(config.lora_targets))
        modules = {p.name.split(".")[-2] for p in table}
        unknown = [name for name in _words(config.lora_full) if name not in modules]
        if unknown:
            raise ValueError(
                f"lora_full names {unknown[0]!r}, but the model has no such module; it has {', '.join(sorted(modules))}"
            )
        full = {p.path for p in table if p.name.split(".")[-2] in _words(config.lora_full)}
        trainable = {p.path for p in factors} | full
        table = [*table, *factors]
    if model.tie_embeddings and mesh.pp > 1:
        raise ValueError(f"the model ties its embeddings, which live on two stages with pp {mesh.pp}; train it with pp 1")
    try:
        for p in table:
            shard(p, mesh.tp_rank, mesh.tp)
        stage = {p.path: p for p in stage_parameters(table, model.num_layers, mesh.pp_rank, mesh.pp)}
    except ValueError as error:
        raise ValueError(f"{config.model}: {error}") from None
    return Setup(config, model, mesh, tensor_axis(mesh, model.vocab_size), stage, frozenset(stage) & trainable)


def start(config: TrainConfig, setup: Setup, reader: Any) -> TrainState:
    """The state before the first step: weights from the reader, LoRA factors from the seed, zero moments."""
    mesh, dtype = setup.mesh, _DTYPES[config.dtype]
    known: list[Parameter] = [p for p in setup.table.values() if p.name in reader.shapes]
    fresh = [p for p in setup.table.values() if p.name not in reader.shapes]
    given = load(known, lambda p, piece: reader.read(p.name, piece), dtype, mesh.device, mesh.tp_rank, mesh.tp)
    made = init(fresh, config.seed, dtype, mesh.device, mesh.tp_rank, mesh.tp)
    params = unflatten({**flatten(given), **flatten(made)})
    scale = LossScale(config.loss_scale, 0, config.hysteresis) if config.dtype == "fp16" else LossScale()
    return TrainState(params, init_optimizer({k: t for k, t in flatten(params).items() if k in setup.trainable}), scale)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _keep_records(path: Path, steps: int) -> None:
    """Drop the records of steps that the checkpoint does not know, so that the file continues without a seam."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # A run that was killed may have left half a last line.
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps]
    with atomic_file(path) as partial:
        partial.write_text("".join(kept))


def train(config: TrainConfig) -> dict[str, Any]:
    """Run the training that `config` describes; returns its summary (on every rank).

    Writes {output}/metrics.jsonl (one record a step), {output}/train.json (the settings) and {output}/step_XXXXXXX.
    ValueError before anything is written for settings, model and data that do not fit together.
    """
    mesh = init_mesh(config.tp, config.pp, config.timeout)
    rows = config.global_batch_size // mesh.dp
    if config.global_batch_size % (mesh.dp * config.micro_batch_size):
        raise ValueError(
            f"global batch size {config.global_batch_size} is not a multiple of micro batch size {config.micro_batch_size} "
            f"x data-parallel size {mesh.dp}"
        )
    reader = open_checkpoint(config.model, lora=_words(config.lora), vocab_size=config.vocab_size or None)
    setup, data = plan(reader.config, config, mesh), open_data(config, reader.config.vocab_size, mesh)
    run = Path(config.output)
    begun = (run / "latest").exists()
    if begun and not config.resume:
        raise ValueError(f"{run}: holds the checkpoints of a run; give --resume to go on with it, or another --output")
    if not begun and run.resolve() == Path(config.model).resolve():
        raise ValueError(f"{run}: is the folder of the model itself; give another --output")
    state = restore(run, setup, _DTYPES[config.dtype]) if begun else start(config, setup, reader)
    first = state.step
    main = mesh.rank == 0
    if main:
        run.mkdir(parents=True, exist_ok=True)
        tidy(run)
        copy_tokenizer(reader.tokenizer, run)
        _keep_records(run / "metrics.jsonl", first)
        with atomic_file(run / "train.json") as partial:
            partial.write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")

    records: list[dict[str, float]] = []
    bar = tqdm(total=config.steps, initial=first, unit="step", desc="training", disable=None if main else True, file=sys.stderr)
    while state.step < config.steps:
        began = time.perf_counter()
        mine = slice(mesh.dp_rank * rows, (mesh.dp_rank + 1) * rows)
        found = batch(
            data, state.samples, config.global_batch_size, config.seed, config.seq_length, config.pad_to or "length", mine
        )
        tokens, labels = (x.to(mesh.device).unflatten(0, (-1, config.micro_batch_size)) for x in found)
        state, metrics = train_step(state, tokens, labels, setup)
        seconds = time.perf_counter() - began
        model_tflops = teraflops(3, config.global_batch_size, tokens.shape[-1], setup.model, seconds, mesh.world)
        record = {
            **dataclasses.asdict(metrics),
            "step": state.step,
            "samples": state.samples,
            "seconds": seconds,
            "global_batch_size": config.global_batch_size,
            "seq_length": tokens.shape[-1],
            "skipped": state.step - state.updates - state.nan_steps,
            "nan_steps": state.nan_steps,
            "samples_per_second": config.global_batch_size / seconds,
            "tflops": model_tflops * (4 / 3 if config.recompute == "full" else 1),
            "model_tflops": model_tflops,
        }
        records.append(record)
        if main:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            if state.step % config.log_every == 0 or state.step == config.steps:
                tqdm.write(log_line(record, config.steps), file=sys.stdout)
            bar.update()
        if state.step == config.steps or (config.save_every and state.step % config.save_every == 0):
            save(state, setup, run)
    bar.close()
    if not records:
        if main:
            print(f"{run}: has done {first} steps and {config.steps} are asked for, so nothing is left to do; raise --steps")
        return {"steps": 0}
    ends = {"loss_first": records[0]["loss"], "loss_last": records[-1]["loss"]}
    return {"steps": len(records), **ends, **throughput(records, mesh.world)}
