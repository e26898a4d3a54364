"""How much memory each device of a pipeline stage needs, by part."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyalpaca.model import Parameter
from pyalpaca.parallel import simulate
from pyalpaca.plan.activations import FP32, block_bytes, block_work, head_bytes, head_work, numbers, rotary_bytes
from pyalpaca.plan.job import Job, local_shape

_DEEPSPEED_BUCKET = 5 * 10**8
"""DeepSpeed's own default of reduce_bucket_size, in numbers; the published configuration has 1e8."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. activations: kept from forward to backward passes, of all micro-batches that are under way; work: what
    the backward pass holds beside them at its worst moment; buffers: gradients on their way."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    work: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.work + self.buffers


def numbers_to_update(p: Parameter, job: Job, largest: bool = True) -> int:
    """How many numbers of a tensor a data-parallel rank updates: all, or with ZeRO its share of the rows.

    largest: of the rank with most rows; else of the first, which has the fewest.
    """
    rows, *rest = local_shape(p, job)
    if not job.zero or job.dp == 1:
        return rows * math.prod(rest)
    return (-(-rows // job.dp) if largest else rows // job.dp) * math.prod(rest)


def in_flight(job: Job) -> list[float]:
    """The most micro-batches that each stage holds activations of; a chunk is a part of one."""
    return [held / job.chunks for held in simulate([job.actions(s) for s in range(job.pp)]).in_flight]


def static_memory(job: Job, stage: int) -> tuple[int, int, int, int]:
    """(weights, gradients, optimizer, buffers) of a stage."""
    held = job.held(stage)
    learning = [p for p in held if job.learns(p)]
    all_numbers, learned = numbers(held, job), numbers(learning, job)
    state = 2 * FP32 + (FP32 if job.width < FP32 else 0)  # two moments, and a master of what is narrower
    if job.zero >= 2:
        own = -(-learned // job.dp)
        weights = -(-all_numbers // job.dp) if job.zero == 3 else all_numbers
        bucket = min(2 * _DEEPSPEED_BUCKET, 2 * learned) * job.width
        # DeepSpeed accumulates in the weights' type and makes fp32 of it for the step.
        return weights * job.width, own * (job.width + (FP32 if job.width < FP32 else 0)), own * state, bucket
    shared = sum(numbers_to_update(p, job) for p in learning)
    # ZeRO-1 leaves each rank its own sums, in memory of their own, beside the buckets that brought them.
    received = shared * FP32 if job.zero and job.dp > 1 else 0
    return all_numbers * job.width, learned * FP32, shared * state, received


def memory(job: Job, stage: int, held: float) -> Memory:
    """What a device of a stage needs, with activations of so many micro-batches at once."""
    weights, gradients, optimizer, buffers = static_memory(job, stage)
    layers, last = job.blocks(stage), stage == job.pp - 1
    how = [job.recomputed(i) for i in layers]
    bytes_of, work_of = ({h: f(job, h) for h in set(how)} for f in (block_bytes, block_work))
    kept = [rotary_bytes(job), *(bytes_of[h] for h in how)]
    activations = sum(kept) + (head_bytes(job) if last else 0)
    # The backward pass goes from the end: when a block's turn comes, what was kept after it is gone.
    moments = [sum(kept[: n + 2]) + work_of[h] for n, h in enumerate(how)]
    if last:
        moments.append(activations + head_work(job))
    if job.zero == 3:
        buffers += 2 * numbers(job.block_table, job) * job.width  # one block's weights, gathered while the one before is in use
    work = max(0, max(moments) - activations)
    return Memory(weights, gradients, optimizer, round(activations * held), work, buffers)
