"""A plan as people read it, and as one JSON object."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pyalpaca.plan.estimate import Plan, make_plan
from pyalpaca.plan.job import Job
from pyalpaca.plan.memory import Memory

PARTS = tuple(field.name for field in dataclasses.fields(Memory))
_LAYOUT = (
    *("tp", "cp", "pp", "dp", "sequence_parallel", "zero", "schedule", "chunks"),
    *("micro_batch", "global_batch", "seq", "dtype", "recompute", "recompute_every", "lora_r"),
)
MODES = (("none", 1), ("selective", 1), ("full", 2), ("full", 1))


def layout_name(job: Job) -> str:
    """tp4 pp2 dp1, sequence parallelism and ZeRO where there are some."""
    sequence, context = " sp" * job.sequence_parallel, f" cp{job.cp}" * (job.cp > 1)
    name = f"tp{job.tp}{sequence}{context} pp{job.pp} dp{job.dp}"
    return f"{name} zero{job.zero}" if job.zero else name


def recompute_name(recompute: str, every: int) -> str:
    return recompute if every == 1 or recompute == "none" else f"{recompute} in 1 of {every}"


def reason(plan: Plan) -> str:
    """Why a plan does not fit: the stage, what it needs and of what most, what there is, and what would help."""
    stage = max(range(len(plan.stages)), key=lambda s: plan.stages[s].memory.total)
    need = plan.stages[stage].memory
    largest = sorted(PARTS, key=lambda part: -getattr(need, part))[:2]
    most = " and ".join(f"{_size(getattr(need, part))} for {part}" for part in largest)
    where = f"a device of pipeline stage {stage} needs" if plan.job.pp > 1 else "a device needs"
    return f"{where} {_size(need.total)} ({most}), and {plan.device.name} has {_size(plan.room)}; {_remedy(plan, largest[0])}"


def _remedy(plan: Plan, part: str) -> str:
    job = plan.job
    if part in ("activations", "work"):
        if job.recompute != "full" or job.recompute_every > 1:
            return "give --recompute full, or a smaller micro batch"
        return "give a smaller micro batch or a shorter sequence, or more tensor parallelism"
    if part == "optimizer" and job.dp > 1 and not job.zero:
        return "give --zero 1, or more tensor or pipeline parallelism"
    return "give more tensor or pipeline parallelism" if job.lora_r else "give LoRA (--lora-r), or more devices for tp and pp"


def page(plan: Plan, name: str) -> str:
    """All of a plan, for a terminal."""
    job, device = plan.job, plan.device
    total = sum(math.prod(p.shape) for p in job.table)
    learned = sum(math.prod(p.shape) for p in job.table if job.learns(p))
    kind = f"LoRA of rank {job.lora_r}: {learned:,} of them trained" if job.lora_r else "all trained"
    schedule = f", schedule {job.schedule}" if job.pp > 1 else ""
    chunks = f" with {job.chunks} virtual stages each" if job.chunks > 1 else ""
    lines = [
        f"model      {name}: {total:,} parameters, {kind}",
        f"layout     {layout_name(job)}: {job.devices} x {device.name} ({device.tflops:.0f} TFLOPs, {_size(device.memory)})"
        f"{schedule}{chunks}",
        f"step       {job.global_batch} samples of {job.seq} tokens, {job.micro_batches} micro-batches of {job.micro_batch}, "
        f"{job.dtype}, recompute {recompute_name(job.recompute, job.recompute_every)}",
        "",
        *_memory_table(plan),
        "",
        f"recompute  {_by_mode(plan)}",
        "",
        *_traffic_table(plan),
        "",
        *_time_table(plan),
        "",
        f"a step     {plan.seconds:.2f} s at {plan.efficiency:g} of the device's limits, nothing hidden behind anything"
        + (f"; bubble {plan.bubble:.1%}" if job.pp > 1 else ""),
        f"a device   {plan.samples_per_second:.2f} samples/s, {plan.tokens_per_second:.2f} tokens/s, {plan.tflops:.2f} TFLOPs, "
        f"HFU {plan.hfu:.1%}, MFU {plan.mfu:.1%}{' (as published: counted as if all weights were trained)' * bool(job.lora_r)}",
        "fits" if plan.fits else f"DOES NOT FIT: {reason(plan)}",
    ]
    return "\n".join(lines)


def _memory_table(plan: Plan) -> list[str]:
    rows = [["GB", *PARTS, "total", f"of {plan.room / 1e9:.2f}"]]
    for s, stage in enumerate(plan.stages):
        values = [getattr(stage.memory, part) for part in PARTS]
        share = f"{stage.memory.total / plan.room:.0%}"
        rows.append([_stage_name(plan, s), *(f"{v / 1e9:.2f}" for v in values), f"{stage.memory.total / 1e9:.2f}", share])
    return _aligned(rows)


def _by_mode(plan: Plan) -> str:
    """The largest stage under each kind of recomputation."""
    told = []
    for recompute, every in MODES:
        other = make_plan(replace(plan.job, recompute=recompute, recompute_every=every), plan.device, plan.efficiency)
        mark = "" if other.fits else " (too much)"
        told.append(f"{recompute_name(recompute, every)}: {_size(other.memory)}, {other.seconds:.2f} s{mark}")
    return "; ".join(told)


def _traffic_table(plan: Plan) -> list[str]:
    keys = sorted({key for stage in plan.stages for key in stage.traffic})
    if not keys:
        return ["nothing is moved between devices"]
    rows = [["moved in a step", *(" ".join(key) for key in keys)]]
    for s, stage in enumerate(plan.stages):
        rows.append([_stage_name(plan, s), *(_size(stage.traffic.get(key, 0)) for key in keys)])
    return _aligned(rows)


def _time_table(plan: Plan) -> list[str]:
    rows = [["ms", "forward", "backward", "gradients and optimizer", "micro-batches held"]]
    for s, stage in enumerate(plan.stages):
        times = (stage.forward, stage.backward, stage.rest)
        rows.append([_stage_name(plan, s), *(f"{t * 1e3:.1f}" for t in times), f"{stage.micro_batches:g}"])
    return _aligned(rows)


def search_table(plans: Sequence[Plan]) -> str:
    """The plans of a search, one a line."""
    rows = [["layout", "micro batch", "recompute", "GB", "s/step", "tokens/s/p", "bubble", "HFU", "MFU"]]
    for plan in plans:
        job = plan.job
        rows.append(
            [
                layout_name(job),
                f"{job.micro_batch}",
                recompute_name(job.recompute, job.recompute_every),
                f"{plan.memory / 1e9:.1f}",
                f"{plan.seconds:.2f}",
                f"{plan.tokens_per_second:.1f}",
                f"{plan.bubble:.1%}",
                f"{plan.hfu:.1%}",
                f"{plan.mfu:.1%}",
            ]
        )
    return "\n".join(_aligned(rows))


def as_json(plan: Plan, name: str) -> dict[str, Any]:
    """The plan's numbers: bytes, seconds, shares."""
    job = plan.job
    stages = [
        {
            **{key: getattr(stage, key) for key in ("layers", "parameters", "trainable", "micro_batches", "forward", "backward")},
            "rest": stage.rest,
            "memory": {**dataclasses.asdict(stage.memory), "total": stage.memory.total},
            "moved": {" ".join(key): count for key, count in stage.traffic.items()},
        }
        for stage in plan.stages
    ]
    layout = {key: getattr(job, key) for key in _LAYOUT}
    return {
        "model": name,
        "layout": layout,
        "device": dataclasses.asdict(plan.device),
        "efficiency": plan.efficiency,
        "parameters": sum(math.prod(p.shape) for p in job.table),
        "trainable": sum(math.prod(p.shape) for p in job.table if job.learns(p)),
        "memory": plan.memory,
        "room": plan.room,
        "fits": plan.fits,
        "reason": None if plan.fits else reason(plan),
        "seconds": plan.seconds,
        "bubble": plan.bubble,
        "samples_per_second_per_device": plan.samples_per_second,
        "tokens_per_second_per_device": plan.tokens_per_second,
        "tflops": plan.tflops,
        "model_tflops": plan.model_tflops,
        "hfu": plan.hfu,
        "mfu": plan.mfu,
        "stages": stages,
    }


def _stage_name(plan: Plan, stage: int) -> str:
    layers = plan.stages[stage].layers
    return f"stage {stage} ({layers} layers)" if plan.job.pp > 1 else f"{layers} layers"


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size / 10:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
