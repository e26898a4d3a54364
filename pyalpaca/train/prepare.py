"""Before the first step: the shares of the data, what this rank holds and what of it learns, the first state."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyalpaca.checkpoint import read_native_meta
from pyalpaca.data import (
    Data,
    InstructionData,
    PackedData,
    TextData,
    fingerprint,
    open_instruction_data,
    open_text_data,
    pack,
    split_instruction_data,
    split_text_data,
)
from pyalpaca.model import (
    LlamaConfig,
    Parameter,
    chunk_parameters,
    flatten,
    init,
    load,
    lora_parameters,
    parameters,
    shard,
    unflatten,
)
from pyalpaca.parallel import Mesh, context_axis, pipeline_schedule, sequence_parameters, tensor_axis
from pyalpaca.train.config import TrainConfig
from pyalpaca.train.optimizer import init_optimizer, updated
from pyalpaca.train.schedule import LossScale
from pyalpaca.train.step import Setup, TrainState

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DATA_SETTINGS = ("data_type", "split", "pack", "seed", "seq_length", "global_batch_size")


class Shares(NamedTuple):
    """The three shares of a data set, and a fingerprint of the whole."""

    train: Data
    valid: Data
    test: Data
    fingerprint: str


def open_data(config: TrainConfig, vocab_size: int, mesh: Mesh) -> Shares:
    """The data set that the settings name, cut as they say.

    ValueError if it has tokens that the model does not know, nothing to learn, or nothing to evaluate where that is asked for.
    """
    whole: TextData | InstructionData
    train: Data
    valid: Data
    test: Data
    if config.data_type == "text":
        whole = open_text_data(config.data, config.seq_length)
        train, valid, test = split_text_data(whole, config.split)
        tokens = whole.text.tokens
    else:
        whole = open_instruction_data(config.data)
        train, valid, test = split_instruction_data(whole, config.split)
        tokens = whole.input_ids.tokens
    if not len(train):
        raise ValueError(f"{config.data}: the split {config.split!r} leaves no sample to train on; raise its first number")
    if config.eval_every and not len(valid):
        raise ValueError(
            f"{config.data}: the split {config.split!r} leaves none of {len(whole)} samples to evaluate; raise its second number "
            "or leave eval_every out"
        )
    if (largest := int(tokens.max())) >= vocab_size:
        raise ValueError(
            f"{config.data}: holds the token {largest}, but the model in {config.model} has {vocab_size} tokens; "
            "prepare the data with the model's own tokenizer"
        )
    if isinstance(train, InstructionData):
        _check_answers(train, config, mesh)
        if config.pack:
            train = _pack(train, config, mesh)
    return Shares(train, valid, test, fingerprint(whole))


def _pack(data: InstructionData, config: TrainConfig, mesh: Mesh) -> PackedData:
    packed = pack(data, config.seq_length)
    if mesh.rank == 0:
        print(
            f"packed {len(data)} samples into {len(packed)} rows of {config.seq_length} tokens, {packed.filled():.1%} full",
            file=sys.stderr,
        )
    return packed


def _check_answers(data: InstructionData, config: TrainConfig, mesh: Mesh) -> None:
    """Samples without a label teach nothing: if all are so, that is an error."""
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


def count_steps(config: TrainConfig, samples: int) -> TrainConfig:
    """The settings with steps instead of epochs: as many as these passes over the training samples take, rounded up."""
    if not config.epochs:
        return config
    return replace(config, steps=max(1, math.ceil(config.epochs * samples / config.global_batch_size)), epochs=0.0)


def check_same_data(run: Path, config: TrainConfig, data_fingerprint: str) -> None:
    """ValueError if a run that goes on would not see the batches that it would have seen, naming what differs."""
    written = run / "train.json"
    begun = json.loads(written.read_text()) if written.is_file() else read_native_meta(run).get("train_config", {})
    now = dataclasses.asdict(config)
    differing = [f"{name} {begun[name]}, now {now[name]}" for name in _DATA_SETTINGS if begun.get(name, now[name]) != now[name]]
    if begun.get("data_fingerprint", data_fingerprint) != data_fingerprint:
        differing.insert(0, f"the data {begun.get('data')}, now others ({config.data})")
    if differing:
        raise ValueError(
            f"{run}: was begun with {'; '.join(differing)}; resume with that run's settings, or begin another with "
            f"--model {run} and another --output"
        )


def plan(model: LlamaConfig, config: TrainConfig, mesh: Mesh) -> Setup:
    """Which parameters this rank holds and which of them learn. ValueError for what the layout can't cut."""
    table = parameters(model)
    trainable = {p.path for p in table}
    if config.lora_r:
        model = replace(model, lora_scale=(config.lora_alpha or 2 * config.lora_r) / config.lora_r)
        factors = lora_parameters(table, config.lora_r, words(config.lora_targets))
        modules = {p.name.split(".")[-2] for p in table}
        unknown = [name for name in words(config.lora_full) if name not in modules]
        if unknown:
            raise ValueError(
                f"lora_full names {unknown[0]!r}, but the model has no such module; it has {', '.join(sorted(modules))}"
            )
        full = {p.path for p in table if p.name.split(".")[-2] in words(config.lora_full)}
        trainable = {p.path for p in factors} | full
        table = [*table, *factors]
    if model.tie_embeddings and mesh.pp > 1:
        raise ValueError(f"the model ties its embeddings, which live on two stages with pp {mesh.pp}; train it with pp 1")
    if config.sequence_parallel:
        table = sequence_parameters(table)
    pipeline_schedule(config.schedule, mesh.pp_rank, mesh.pp, micro_batches(config, mesh), config.virtual_stages)
    try:
        for p in table:
            shard(p, mesh.tp_rank, mesh.tp)
        parts = chunk_parameters(table, model.num_layers, mesh.pp_rank, mesh.pp, config.virtual_stages, config.layer_counts)
    except ValueError as error:
        raise ValueError(f"{config.model}: {error}") from None
    axis = context_axis(tensor_axis(mesh, model.vocab_size, config.sequence_parallel), mesh)
    held = {p.path: p for part in parts for p in part}
    chunks = tuple(tuple(p.path for p in part) for part in parts)
    return Setup(config, model, mesh, axis, held, frozenset(held) & trainable, chunks)


def micro_batches(config: TrainConfig, mesh: Mesh) -> int:
    """How many micro-batches a step has on each data-parallel rank. ValueError if the global batch does not divide so."""
    if config.global_batch_size % (mesh.dp * config.micro_batch_size):
        raise ValueError(
            f"global batch size {config.global_batch_size} is not a multiple of micro batch size {config.micro_batch_size} "
            f"x data-parallel size {mesh.dp}"
        )
    return config.global_batch_size // (mesh.dp * config.micro_batch_size)


def start(config: TrainConfig, setup: Setup, reader: Any) -> TrainState:
    """The state before the first step: weights from the reader, LoRA factors from the seed, zero moments."""
    mesh, dtype = setup.mesh, DTYPES[config.dtype]
    known: list[Parameter] = [p for p in setup.table.values() if p.name in reader.shapes]
    fresh = [p for p in setup.table.values() if p.name not in reader.shapes]
    given = load(known, lambda p, piece: reader.read(p.name, piece), dtype, mesh.device, mesh.tp_rank, mesh.tp)
    made = init(fresh, config.seed, dtype, mesh.device, mesh.tp_rank, mesh.tp)
    params = unflatten({**flatten(given), **flatten(made)})
    scale = LossScale(config.loss_scale, 0, config.hysteresis) if config.dtype == "fp16" else LossScale()
    trainable = {path: t for path, t in flatten(params).items() if path in setup.trainable}
    native = config.engine == "native"  # DeepSpeed makes its own
    return TrainState(params, init_optimizer(updated(trainable, mesh, config) if native else {}), scale)


def words(text: str) -> list[str]:
    """The names in a list such as "a, b"."""
    return [word.strip() for word in text.split(",") if word.strip()]
