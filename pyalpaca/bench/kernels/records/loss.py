"""The head of the model and its cross entropy in one, over the vocabulary of Chinese-Alpaca."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalpaca.bench.kernels.operator import Case, Operator, Work, compiled, plain
from pyalpaca.ops import linear_cross_entropy

SHAPES = {
    "alpaca7b/512": (512, 49954, 4096),
    "width1024/4096": (4096, 49954, 1024),
    "small/64": (64, 997, 256),
}


def _make(case: Case) -> list[Any]:
    tokens, vocabulary, width = case.sizes
    weight = case.random(vocabulary, width, dtype=torch.float32, grad=False) / width**0.5
    labels = torch.randint(vocabulary, (tokens,)).to(case.device)
    return [case.random(tokens, width), weight.to(case.torch_dtype).requires_grad_(), labels]


def _work(case: Case, direction: str) -> Work:
    tokens, vocabulary, width = case.sizes
    product = 2.0 * tokens * vocabulary * width
    x, weight = tokens * width * case.item, vocabulary * width * case.item
    forward = Work(product, x + weight + 8 * tokens, 4)
    return forward if direction == "fwd" else forward + Work(2 * product, 0, x + weight)


def _plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    # As transformers has it: the logits whole, in fp32 for the loss.
    return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")


LINEAR_CROSS_ENTROPY = Operator(
    "linear_cross_entropy",
    axes="tokens x vocabulary x width",
    formula="x, the weight and the labels are read; `both` writes both gradients too; 2 flops a token and weight, 6 for `both`",
    shapes=SHAPES,
    make=_make,
    ours=linear_cross_entropy,
    work=_work,
    peers=(plain(_plain), compiled(_plain)),
    directions=("fwd", "both"),
    devices=("cpu", "npu"),
)
