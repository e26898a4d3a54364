"""How much memory each device of a pipeline stage needs, by part."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyalpaca.model import Parameter
from pyalpaca.parallel import simulate
from pyalpaca.plan.activations import FP32, block_bytes, block_work, head_bytes, head_work, numbers, rotary_bytes
from pyalpaca.plan.job import Job, local_shape


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. activations: kept from forward to backward passes, of all micro-batches that are under way; work: what
    the backward pass holds beside them at its worst moment; buffers: gradients and messages on their way.

    Of a single micro-batch the gradients take the place of the activations one by one, and both are as at the worst moment."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    work: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.work + self.buffers


def numbers_to_update(p: Parameter, job: Job, rank: int | None = None, replica: int | None = None) -> int:
    """How many numbers of a tensor a rank updates: all it holds, or with ZeRO its share of the rows.

    rank: see `local_shape`. replica: which of those that hold the same weights; by default one with most rows.
    """
    rows, *rest = local_shape(p, job, rank)
    if job.zero and replica is None:
        rows = -(-rows // job.replicas)
    elif job.zero and replica is not None:
        rows = (replica + 1) * rows // job.replicas - replica * rows // job.replicas
    return rows * math.prod(rest)


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
        own = -(-learned // job.replicas)
        weights = -(-all_numbers // job.replicas) if job.zero == 3 else all_numbers
        bucket = 2 * min(job.bucket, learned) * job.width
        # DeepSpeed accumulates in the weights' type and makes fp32 of it for the step.
        return weights * job.width, own * (job.width + (FP32 if job.width < FP32 else 0)), own * state, bucket
    shared = sum(numbers_to_update(p, job) for p in learning)
    return all_numbers * job.width, learned * (FP32 if summed(job) else job.width), shared * state, 0


def summed(job: Job) -> bool:
    """Whether gradients are added to sums that last for the whole step; else each stays as the backward pass has made it."""
    return job.micro_batches > 1 or job.replicas > 1


def messages(job: Job, stage: int) -> int:
    """Bytes of what a stage has sent to its neighbours and keeps until they have surely received it (see `run_pipeline`)."""
    directions = (stage < job.pp - 1) + (stage > 0) if job.chunks == 1 else 2
    kept = min(job.micro_batches * job.chunks, (job.chunks + 1) * job.pp + 2)
    return directions * kept * job.stream_tokens * job.model.hidden_size * job.width


def memory(job: Job, stage: int, held: float) -> Memory:
    """What a device of a stage needs, with activations of so many micro-batches at once."""
    weights, gradients, optimizer, buffers = static_memory(job, stage)
    buffers += messages(job, stage) if job.pp > 1 else 0
    layers, last = job.blocks(stage), stage == job.pp - 1
    how = [job.recomputed(i) for i in layers]
    bytes_of, work_of = ({h: f(job, h) for h in set(how)} for f in (block_bytes, block_work))
    kept = [rotary_bytes(job), *(bytes_of[h] for h in how)]
    head = head_bytes(job) if last else 0
    activations = sum(kept) + head
    # The backward pass goes from the end: when a block's turn comes, what was kept after it is gone.
    moments = [sum(kept[: n + 2]) + work_of[h] for n, h in enumerate(how)]
    if last:
        moments.append(activations + head_work(job))
    if job.zero == 3:
        buffers += 2 * numbers(job.block_table, job) * job.width  # one block's weights, gathered while the one before is in use
    # Of the head only one micro-batch is under way: its backward pass follows at once, and weights it leaves none to be put off.
    work, kept_of_all = max(0, max(moments) - activations), round(sum(kept) * held) + head
    if not summed(job):
        gradients, kept_of_all, work = _one_by_one(job, stage, kept, moments, kept_of_all, gradients)
    # What ZeRO-1 leaves a rank of the sums comes when the activations have gone.
    buffers += max(0, _received(job, stage) - kept_of_all - work)
    return Memory(weights, gradients, optimizer, kept_of_all, work, buffers)


def _one_by_one(
    job: Job, stage: int, kept: list[int], moments: list[int], kept_of_all: int, gradients: int
) -> tuple[int, int, int]:
    """(gradients, activations, work) at the worst moment of a backward pass whose gradients come as the activations go.

    kept, moments: see `memory`. Before a block's turn the gradients of those after it are there, after it its own as well.
    """
    of_block = numbers([p for p in job.block_table if job.learns(p)], job) * job.width
    of_ends = [p for p in job.held(stage) if p.layer is None and p.path != "embed" and job.learns(p)]
    there, blocks = numbers(of_ends, job) * job.width, len(kept) - 1
    found = [(there + (blocks - n - 1) * of_block, moments[n]) for n in range(blocks)]
    found += [(there + (blocks - n) * of_block, sum(kept[: n + 1])) for n in range(blocks)]
    found += [(0, moment) for moment in moments[blocks:]] + [(gradients, kept[0])]
    early, other = max(found, key=sum)
    activations = min(kept_of_all, other)
    return early, activations, other - activations


def _received(job: Job, stage: int) -> int:
    """Bytes of a rank's own sums, beside the buckets that brought them."""
    if job.zero != 1 or job.replicas == 1:
        return 0
    return sum(numbers_to_update(p, job) for p in job.held(stage) if job.learns(p)) * FP32
