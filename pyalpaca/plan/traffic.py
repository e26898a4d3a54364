"""How many bytes the ranks of a layout move in one step, by axis and collective, as the runtime's own counter sees them.

A collective's bytes are those of the whole tensor: what is summed, what is gathered, what is scattered, what is sent.
"""

from __future__ import annotations

import math
from collections import Counter

from pyalpaca.parallel import Traffic
from pyalpaca.plan.activations import FP32
from pyalpaca.plan.devices import Device
from pyalpaca.plan.job import Job, local_shape
from pyalpaca.plan.memory import numbers_to_update

_FP64 = 8


def traffic(job: Job, stage: int, rank: int | None = None, replica: int | None = None) -> Traffic:
    """What a rank of a stage moves in one step, with ZeRO-2 and -3 as DeepSpeed does it.

    rank: of tensor parallelism; replica: of those with the same weights; by default those that move most.
    """
    moved: Counter[tuple[str, str]] = Counter()
    _tensor_parallel(moved, job, stage, rank, replica)
    _context_parallel(moved, job, stage)
    _pipeline(moved, job, stage)
    _replicas(moved, job, stage, rank)
    return {key: count for key, count in sorted(moved.items()) if count}


def _tensor_parallel(moved: Counter[tuple[str, str]], job: Job, stage: int, rank: int | None, replica: int | None) -> None:
    """Shoeybi et al. 2019, with sequence parallelism Korthikanti et al. 2022."""
    if job.tp == 1:
        return
    first, last = stage == 0, stage == job.pp - 1
    enters, exits, enters_back, exits_back = 0, 0, 0, 0
    for n, layer in enumerate(job.blocks(stage)):
        how = job.recomputed(layer)
        # Computing again ends with the last tensor that was not kept, which is before the second exit.
        enters += 2 if how == "none" else 4
        exits += 3 if how == "full" else 2
        # What nothing before it learns from is not differentiated: the first norm, if the embedding is frozen.
        enters_back += 2 - (first and n == 0 and _frozen_start(job))
        exits_back += 2
    if first:
        exits += 1  # the embedding
        exits_back += not _frozen_start(job)
    if last:
        enters += 1  # the head
        enters_back += 1
    whole = job.gathered_tokens * job.model.hidden_size * job.width * job.micro_batches
    if job.sequence_parallel:
        moved["tp", "all_gather"] += (enters + exits_back) * whole
        moved["tp", "reduce_scatter"] += (exits + enters_back) * whole
    else:
        moved["tp", "all_reduce"] += (exits + enters_back) * whole
    if last:  # the loss: the largest logit, the sum and the target's logit of each token
        moved["tp", "all_reduce"] += 3 * job.tokens * FP32 * job.micro_batches
    for p in job.held(stage):
        summand = p.partial_grad or (job.sequence_parallel and p.dim is None and len(p.shape) == 1)
        if summand and job.learns(p):
            moved["tp", "all_reduce"] += numbers_to_update(p, job, rank, replica) * FP32
    moved["tp", "all_reduce"] += _FP64  # the norm


def _frozen_start(job: Job) -> bool:
    return bool(job.lora_r) and "embed_tokens" not in job.lora_full and "input_layernorm" not in job.lora_full


def _context_parallel(moved: Counter[tuple[str, str]], job: Job, stage: int) -> None:
    """Liu et al. 2023: keys and values go round in every pass, their gradients in the backward pass, and once more to go home."""
    if job.cp == 1:
        return
    keys_values = 2 * job.gathered_tokens * job.model.num_kv_heads // job.tp * job.model.head_dim
    for layer in job.blocks(stage):
        passes = 3 if job.recomputed(layer) == "full" else 2
        each = passes * (job.cp - 1) * keys_values * job.width + job.cp * keys_values * FP32
        moved["cp", "send"] += each * job.micro_batches


def _pipeline(moved: Counter[tuple[str, str]], job: Job, stage: int) -> None:
    if job.pp == 1:
        return
    virtual = job.pp * job.chunks
    forward = sum(c * job.pp + stage < virtual - 1 for c in range(job.chunks))
    backward = sum(c * job.pp + stage > 0 for c in range(job.chunks))
    hidden = job.stream_tokens * job.model.hidden_size * job.width
    moved["pp", "send"] += (forward + backward) * hidden * job.micro_batches
    moved["pp", "all_reduce"] += _FP64 + FP32  # the norm, the loss


def _replicas(moved: Counter[tuple[str, str]], job: Job, stage: int, rank: int | None) -> None:
    """The gradients once a step, with ZeRO-1 scattered and the weights gathered (Rajbhandari et al. 2020).

    DeepSpeed scatters them in the weights' type, with ZeRO-2 and -3 after each micro-batch; with ZeRO-3 every pass gathers
    the weights.
    """
    if job.replicas == 1:
        return
    held = job.held(stage)
    learning = [p for p in held if job.learns(p)]
    moved["dp", "all_reduce"] += 2 * FP32  # how many labels, the loss
    if job.zero == 0:
        moved["dp", "all_reduce"] += sum(math.prod(local_shape(p, job, rank)) for p in learning) * FP32
    elif job.zero == 1:
        rows = job.replicas * sum(numbers_to_update(p, job, rank) for p in learning)
        moved["dp", "reduce_scatter"] += rows * FP32
        moved["dp", "all_gather"] += rows * job.width
        moved["dp", "all_reduce"] += _FP64  # the norm
    else:
        learned = sum(math.prod(local_shape(p, job, rank)) for p in learning)
        everything = sum(math.prod(local_shape(p, job, rank)) for p in held)
        moved["dp", "reduce_scatter"] += learned * job.width * job.micro_batches
        moved["dp", "all_gather"] += learned * job.width if job.zero == 2 else 2 * everything * job.width * job.micro_batches


def seconds(moved: Traffic, job: Job, device: Device) -> dict[str, float]:
    """How long each axis takes at the full rate of its links, by ring algorithms (Patarasuk and Yuan 2009)."""
    inner = job.tp * job.replicas
    spans = {"tp": (1, job.tp), "cp": (job.tp, job.cp), "dp": (job.tp, job.replicas), "pp": (inner, job.pp)}
    taken = dict.fromkeys(spans, 0.0)
    for (axis, collective), count in moved.items():
        stride, ranks = spans[axis]
        rate = device.link_rate if stride * ranks <= device.per_node else device.network_rate
        share = {"all_reduce": 2 * (ranks - 1) / ranks, "send": 1.0}.get(collective, (ranks - 1) / ranks)
        taken[axis] += count * share / rate
    return taken
