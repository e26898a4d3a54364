"""Merging LoRA factors into a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyalpaca.bench.kernels.operator import Case, Operator, Work, plain
from pyalpaca.ops import lora_merge, reference

SCALE = 2.0
SHAPES = {"llama7b/4096": (4096, 4096, 64), "llama13b/13824": (13824, 5120, 8), "small/256": (256, 256, 8)}


def _make(case: Case) -> list[Any]:
    rows, columns, rank = case.sizes
    b, a = (case.random(*shape, dtype=torch.float32, grad=False) for shape in ((rows, rank), (rank, columns)))
    return [case.random(rows, columns, grad=False), b, a]


def _work(case: Case, direction: str) -> Work:
    rows, columns, rank = case.sizes
    weight = rows * columns * case.item
    return Work(2.0 * rows * columns * rank, weight + 4.0 * rank * (rows + columns), weight)


def _ours(weight: Tensor, b: Tensor, a: Tensor) -> Tensor:
    return lora_merge(weight, [(b, a, SCALE)])


def _plain(weight: Tensor, b: Tensor, a: Tensor) -> Tensor:
    return reference.lora_merge(weight, [(b, a, SCALE)])


LORA_MERGE = Operator(
    "lora_merge",
    axes="rows x columns x rank",
    formula="the weight is read and written once, the factors read; 2 rank flops a value",
    shapes=SHAPES,
    make=_make,
    ours=_ours,
    work=_work,
    peers=(plain(_plain),),
    directions=("fwd",),
    devices=("cpu",),
)
