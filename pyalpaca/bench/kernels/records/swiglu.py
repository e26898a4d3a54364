"""The gate of the feed-forward network."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalpaca.bench.kernels.operator import DECODE, Case, Function, Operator, Peer, Work, compiled, plain
from pyalpaca.ops import reference, swiglu

SHAPES = {
    "llama7b/2048": (2048, 11008),
    "llama13b/2048": (2048, 13824),
    "llama7b/decode": (1, 11008),
    "small/128": (128, 688),
}


def _make(case: Case) -> list[Any]:
    return [case.random(*case.sizes) for _ in range(2)]


def _work(case: Case, direction: str) -> Work:
    values = case.sizes[0] * case.sizes[1]
    x = values * case.item
    return Work(5 * values, 2 * x, x) if direction == "fwd" else Work(11 * values, 3 * x, 2 * x)


def _functional(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _transformers() -> Function:
    from transformers.activations import ACT2FN

    activation = ACT2FN["silu"]  # as LlamaMLP has it
    return lambda gate, up: activation(gate) * up


def _torch_npu() -> Function:
    import torch_npu

    return lambda both: torch_npu.npu_swiglu(both, dim=-1)


def _side_by_side(inputs: list[Any]) -> list[Any]:
    """Gate and up in one tensor, as torch_npu wants them."""
    gate, up = (x.detach() for x in inputs)
    return [torch.cat((gate, up), dim=-1).requires_grad_()]


SWIGLU = Operator(
    "swiglu",
    axes="tokens x feed-forward width",
    formula="gate and up are read and the product written, backward reads all of these but the product, and its gradient, and "
    "writes two; 5 and 11 flops a value, the exponential one of them",
    shapes=SHAPES,
    make=_make,
    ours=swiglu,
    work=_work,
    peers=(
        plain(reference.swiglu),
        compiled(reference.swiglu),
        Peer("functional", lambda: _functional),
        Peer("transformers", _transformers, needs=("transformers",)),
        Peer("torch_npu", _torch_npu, _side_by_side, needs=("torch_npu",), devices=("npu",)),
    ),
    forward_only=DECODE,
)
