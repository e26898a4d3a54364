"""What a device computes in one step: matrix products, and the passes over memory that surround them."""

from __future__ import annotations

from dataclasses import dataclass

from pyalpaca.model import LlamaConfig, Parameter
from pyalpaca.plan.activations import FP32, numbers
from pyalpaca.plan.job import Job


@dataclass(frozen=True)
class Work:
    """flops: of matrix products, two a multiplication; bytes: read and written by everything else."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> Work:
        return Work(self.flops * factor, self.bytes * factor)


def teraflops(factor: float, batch: int, seq_length: int, model: LlamaConfig, seconds: float, devices: int) -> float:
    """TFLOPs per device of one step as published tables count them (Narayanan et al. 2021, eq. 3), for a global batch.

    factor: 3 for the model's own work (MFU), 4 where the forward pass is computed twice (full recomputation, HFU).
    """
    L, h, V = model.num_layers, model.hidden_size, model.vocab_size
    work = 24 * factor * batch * seq_length * L * h**2 * (1 + seq_length / (6 * h) + V / (16 * L * h))
    return work / (seconds * devices * 1e12)


def computed_twice(num_layers: int, recompute: str, recompute_every: int) -> float:
    """The share of the layers whose forward pass runs twice: selective recomputation repeats no matrix product."""
    return -(-num_layers // recompute_every) / num_layers if recompute == "full" else 0.0


def forward_work(job: Job) -> Work:
    """The forward pass of one block on one micro-batch."""
    m, seen, stream = job.model, job.gathered_tokens, job.stream_tokens
    D, F, H = m.hidden_size, m.intermediate_size // job.tp, m.num_heads // job.tp
    Q, K = H * m.head_dim, m.num_kv_heads // job.tp * m.head_dim
    matrices = 2 * numbers(_matrices(job), job) * seen
    scores = 4 * Q * seen * (job.seq + 1) / 2  # a causal kernel leaves out what is masked
    norms = 2 * 5 * D * stream  # read x, write y; read both summands, write the sum
    rotary, attention, activation = 2 * (Q + K), 2 * Q + 2 * K, 5 * F
    return Work(matrices + scores, (norms + (rotary + attention + activation) * seen) * job.width)


def backward_work(job: Job, how: str) -> Work:
    """The backward pass of one block, what it computes again included."""
    forward = forward_work(job)
    scores = 4 * job.model.num_heads // job.tp * job.model.head_dim * job.gathered_tokens * (job.seq + 1) / 2
    learned = 2 * numbers([p for p in _matrices(job) if job.learns(p)], job) * job.gathered_tokens
    # The gradient of the input takes as much as the forward pass, that of a weight as much again; of attention there are five
    # products to the forward pass's two (Dao 2023).
    result = Work(forward.flops - scores + learned + 2.5 * scores, 2 * forward.bytes)
    if how == "full":
        return result + forward
    if how == "selective":
        m, F = job.model, job.model.intermediate_size // job.tp
        again = 2 * 2 * m.hidden_size * job.stream_tokens + (2 * F + 5 * F) * job.gathered_tokens
        return result + Work(0.0, again * job.width)
    return result


def ends_work(job: Job, stage: int) -> tuple[Work, Work]:
    """(forward, backward) of embedding, last norm, head and loss on one micro-batch."""
    forward, backward = Work(), Work()
    stream = job.stream_tokens * job.model.hidden_size * job.width
    if stage == 0:
        forward += Work(0.0, 2 * stream)
        backward += Work(0.0, 2 * stream)
    if stage == job.pp - 1:
        head = [p for p in job.table if p.path == job.head]
        product = 2.0 * numbers(head, job) * job.tokens
        logits = numbers(head, job) / job.model.hidden_size * job.tokens
        # The head's gradients are made in the forward pass, chunk by chunk. The loss widens the logits, reads them for their
        # largest and their sum, and makes of them in place their distances, weights and gradients, which are narrowed again.
        narrow = 2 * (job.width + FP32) if job.width < FP32 else 0
        forward += Work(product * (2 + job.learns(head[0])), 2 * stream + logits * (2 * job.width + 8 * FP32 + narrow))
        backward += Work(0.0, 3 * stream)
    return forward, backward


def update_work(updated: int, learned: int, job: Job) -> Work:
    """The optimizer's step over `updated` of `learned` numbers: scaling, norm and clipping, AdamW, masters to weights."""
    sweeps = 2 * FP32 + FP32 + 2 * FP32  # unscale, norm, clip
    adamw = 7 * FP32  # weight, gradient and two moments read; all but the gradient written
    masters = FP32 + job.width if job.width < FP32 else 0
    # Every micro-batch adds its gradients to the fp32 sums; DeepSpeed lays them side by side in their own type, to be scattered.
    each = 2 * FP32 + job.width if job.zero < 2 else 2 * job.width
    adding = learned * each * job.micro_batches
    return Work(0.0, updated * (sweeps + adamw + masters) + adding)


def _matrices(job: Job) -> list[Parameter]:
    return [p for p in job.block_table if len(p.shape) == 2]
