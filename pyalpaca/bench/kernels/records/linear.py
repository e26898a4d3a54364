"""Products with the weights of the model: one token as in decoding, a few, and many as in training and prefill."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalpaca.bench.kernels.operator import Case, Operator, Peer, Work, plain
from pyalpaca.ops import linear, reference

SHAPES = {
    "llama7b/decode": (1, 11008, 4096),
    "llama13b/decode": (1, 13824, 5120),
    "llama7b/8": (8, 11008, 4096),
    "llama7b/512": (512, 4096, 4096),
    "small/64": (64, 256, 256),
}
FORWARD_ONLY = frozenset({"llama7b/decode", "llama13b/decode", "llama7b/8"})


def _make(case: Case) -> list[Any]:
    tokens, rows, columns = case.sizes
    return [case.random(tokens, columns), case.random(rows, columns)]


def linear_work(case: Case, direction: str, activation: float, scales: float = 0.0) -> Work:
    """activation: bytes of a value of x and y. scales: bytes of what the stored weights need beside themselves."""
    tokens, rows, columns = case.sizes[:3]
    product, weight = 2.0 * tokens * rows * columns, rows * columns * case.item + scales
    x, y = tokens * columns * activation, tokens * rows * activation
    return Work(product, x + weight, y) if direction == "fwd" else Work(2 * product, y + x + weight, x + weight)


def as_dtype(dtype: torch.dtype) -> Any:
    """The floating-point inputs in another dtype, converted beforehand."""

    def prepare(inputs: list[Any]) -> list[Any]:
        return [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs]

    return prepare


def functional(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


LINEAR = Operator(
    "linear",
    axes="tokens x rows x columns of the weight",
    formula="x and the stored weight are read, y written; backward reads dy, x and the weight and writes two gradients; 2 flops "
    "a token and weight, 4 backward",
    shapes=SHAPES,
    make=_make,
    ours=linear,
    work=lambda case, direction: linear_work(case, direction, case.item),
    peers=(
        plain(reference.linear),
        Peer("torch_bf16", lambda: functional, as_dtype(torch.bfloat16), dtypes=("float32", "float16")),
        Peer("torch_float32", lambda: functional, as_dtype(torch.float32), dtypes=("bfloat16", "float16")),
    ),
    forward_only=FORWARD_ONLY,
)
