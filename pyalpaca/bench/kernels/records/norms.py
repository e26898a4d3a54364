"""Normalisation over the width of the model."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pyalpaca.bench.kernels.operator import DECODE, Case, Function, Operator, Peer, Work, compiled, plain
from pyalpaca.ops import add_rms_norm, reference, rms_norm

EPS = 1e-6
SHAPES = {
    "llama7b/2048": (2048, 4096),
    "llama13b/8192": (8192, 5120),
    "llama7b/decode": (1, 4096),
    "small/128": (128, 256),
}


def _make(case: Case) -> list[Any]:
    return [case.random(*case.sizes), case.random(case.sizes[-1])]


def _work(case: Case, direction: str) -> Work:
    tokens, width = case.sizes
    x, weight = tokens * width * case.item, width * case.item
    if direction == "fwd":
        return Work(4 * tokens * width, x + weight, x)
    return Work(11 * tokens * width, 2 * x + weight, x + weight)


def _functional(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (weight.shape[0],), weight, EPS)


def _transformers() -> Function:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    forward: Function = LlamaRMSNorm.forward
    return lambda x, weight: forward(SimpleNamespace(weight=weight, variance_epsilon=EPS), x)


def _torch_npu() -> Function:
    import torch_npu

    return lambda x, weight: torch_npu.npu_rms_norm(x, weight, epsilon=EPS)[0]


_plain = partial(reference.rms_norm, eps=EPS)

RMS_NORM = Operator(
    "rms_norm",
    axes="tokens x width",
    formula="x is read and y written, backward reads dy and x and writes dx, once each; 4 and 11 flops a value",
    shapes=SHAPES,
    make=_make,
    ours=partial(rms_norm, eps=EPS),
    work=_work,
    peers=(
        plain(_plain),
        compiled(lambda x, weight: reference.rms_norm(x, weight, EPS)),
        Peer("functional", lambda: _functional),
        Peer("transformers", _transformers, needs=("transformers",)),
        Peer("torch_npu", _torch_npu, needs=("torch_npu",), devices=("npu",)),
    ),
    forward_only=DECODE,
)


def _make_add(case: Case) -> list[Any]:
    return [case.random(*case.sizes), *_make(case)]


def _work_add(case: Case, direction: str) -> Work:
    tokens, width = case.sizes
    x, weight = tokens * width * case.item, width * case.item
    if direction == "fwd":
        return Work(5 * tokens * width, 2 * x + weight, 2 * x)
    return Work(12 * tokens * width, 3 * x + weight, x + weight)


def _functional_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _functional(total, weight), total


def _transformers_add() -> Function:
    norm = _transformers()

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norm(total, weight), total

    return add_norm


def _torch_npu_add() -> Function:
    import torch_npu

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        norm, _, total = torch_npu.npu_add_rms_norm(x, residual, weight, epsilon=EPS)
        return norm, total

    return add_norm


_plain_add = partial(reference.add_rms_norm, eps=EPS)

ADD_RMS_NORM = Operator(
    "add_rms_norm",
    axes="tokens x width",
    formula="x and the residual are read, their sum and its norm written; backward reads two gradients and the sum and writes "
    "the one gradient of both; 5 and 12 flops a value",
    shapes=SHAPES,
    make=_make_add,
    ours=partial(add_rms_norm, eps=EPS),
    work=_work_add,
    peers=(
        plain(_plain_add),
        compiled(lambda x, residual, weight: reference.add_rms_norm(x, residual, weight, EPS)),
        Peer("functional", lambda: _functional_add),
        Peer("transformers", _transformers_add, needs=("transformers",)),
        Peer("torch_npu", _torch_npu_add, needs=("torch_npu",), devices=("npu",), directions=("fwd",)),
    ),
    forward_only=DECODE,
)
