"""What autograd keeps of one micro-batch until its backward pass, tensor by tensor, and what that pass holds beside it.

One line a tensor: who changes what a block keeps changes its line here. A test holds all of it against the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pyalpaca.model import Parameter
from pyalpaca.ops import chunk_tokens
from pyalpaca.plan.job import Job, local_shape

FP32 = 4


@dataclass(frozen=True)
class Kept:
    """A tensor that is kept: its bytes, and whether `selective` lets it go."""

    name: str
    bytes: int
    cheap: bool = False


def block(job: Job) -> list[Kept]:
    """The tensors that one block keeps for one micro-batch where nothing is computed again."""
    m, e, stream, seen = job.model, job.width, job.stream_tokens, job.gathered_tokens
    D, F, H = m.hidden_size, m.intermediate_size // job.tp, m.num_heads // job.tp
    Q, K = H * m.head_dim, m.num_kv_heads // job.tp * m.head_dim
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    lora = {name for name in names if job.lora_r and name in job.lora_targets}
    wanted = lora if job.lora_r else set(names)  # projections whose input is needed for the gradient of a weight

    def if_wanted(size: int, *projections: str) -> int:
        return size if wanted & set(projections) else 0

    return [
        Kept("residual stream, attention", stream * D * e),
        Kept("its rstd", stream * FP32),
        Kept("normalised, attention", if_wanted(seen * D * e, "q_proj", "k_proj", "v_proj"), cheap=True),
        Kept("q, k, v", seen * (Q + 2 * K) * e),
        Kept("attention", seen * Q * e),
        Kept("its logsumexp", seen * H * FP32),
        Kept("residual stream, feed-forward", stream * D * e),
        Kept("its rstd", stream * FP32),
        Kept("normalised, feed-forward", if_wanted(seen * D * e, "gate_proj", "up_proj"), cheap=True),
        Kept("gate, up", seen * 2 * F * e),
        Kept("silu(gate) * up", if_wanted(seen * F * e, "down_proj"), cheap=True),
        Kept("LoRA's inner products", seen * len(lora) * job.lora_r * e),
    ]


def block_bytes(job: Job, how: str) -> int:
    """Of one block and one micro-batch, from its forward to its backward pass."""
    kept = block(job)
    if how == "full":
        return kept[0].bytes
    return sum(k.bytes for k in kept if how == "none" or not k.cheap)


def rotary_bytes(job: Job) -> int:
    """Of the rotary tables, cos and sin, of one micro-batch."""
    return job.gathered_tokens // job.micro_batch * job.model.head_dim * FP32


def head_bytes(job: Job) -> int:
    """Of what is kept of the last norm, and of the head with the loss, whose gradients are made in the forward pass."""
    stream = job.stream_tokens * (job.model.hidden_size * job.width + FP32)
    return stream + (job.tokens * job.model.hidden_size + _head_numbers(job)) * job.width


def head_work(job: Job) -> int:
    """The most that the head and the loss hold at once in the forward pass, beyond what they keep."""
    D, e, narrow = job.model.hidden_size, job.width, job.width < FP32
    vocabulary = local_shape(job.table[0], job)[0]
    chunk = chunk_tokens(job.tokens, vocabulary, e)
    normalised = job.gathered_tokens * D * e
    if job.gathered_tokens > job.tokens and job.micro_batch > 1:
        normalised += job.tokens * D * e  # without what fills the sequences up, they are laid side by side again
    # A chunk's logits, which become their gradient, and beside them a chunk of the input's gradient.
    logits = chunk * (vocabulary + D) * e
    # The weight's gradient, counted already, is summed up in fp32: over several chunks with as much beside it.
    lower = _head_numbers(job) * (FP32 - e) if narrow and chunk < job.tokens else 0
    return normalised + logits + lower


def block_work(job: Job, how: str) -> int:
    """The most that the backward pass holds at once of one block, beyond what was kept of it."""
    m, e, seen, kept = job.model, job.width, job.gathered_tokens, block(job)
    cheap = sum(k.bytes for k in kept if k.cheap)
    again = {"none": 0, "selective": cheap, "full": sum(k.bytes for k in kept[1:])}[how]
    # In the feed-forward network, beside the gradient of the stream: first those of silu * up and of the weight of `down`, before
    # it is added to the sum; then, silu * up itself being gone if it was kept, of gate and of up as well.
    D, F = m.hidden_size, m.intermediate_size // job.tp
    down = [p for p in job.block_table if ".ffn.down." in p.path and job.learns(p)]
    weight = max((numbers([p], job) for p in down), default=0)
    sizes = {k.name: k.bytes for k in kept}
    product = sizes["silu(gate) * up"]
    # Where the block has just been computed again: the normalised input, kept or not, and what `down` gave, once more with LoRA.
    given = seen * D * e * (2 if job.lora_r and "down_proj" in job.lora_targets else 1)
    repeated = job.stream_tokens * D * e + seen * D * e - sizes["normalised, feed-forward"] + given if how == "full" else 0
    return again + max((seen * (D + F) + weight) * e, seen * (D + 3 * F) * e - product, repeated)


def _head_numbers(job: Job) -> int:
    """Of the head's gradient: how many numbers of the head are here, if it learns."""
    return numbers([p for p in job.table if p.path == job.head and job.learns(p)], job)


def numbers(parameters: Iterable[Parameter], job: Job) -> int:
    """How many numbers a tensor-parallel rank holds of these parameters."""
    return sum(math.prod(local_shape(p, job)) for p in parameters)
