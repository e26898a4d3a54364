"""Products with weights kept as integers of 8 or 4 bits: one token as in decoding, and many as in prefill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyalpaca.bench.kernels.operator import Case, Function, Operator, Peer, Work, compiled, plain
from pyalpaca.bench.kernels.records.linear import functional, linear_work
from pyalpaca.ops import dequantize, linear_quantized, quantize, reference

SHAPES = {
    "llama7b/decode": (1, 11008, 4096, 0),
    "llama7b/decode/64": (1, 11008, 4096, 64),
    "llama13b/decode": (1, 13824, 5120, 0),
    "llama7b/8": (8, 11008, 4096, 0),
    "llama7b/512": (512, 4096, 4096, 0),
    "llama7b/512/64": (512, 4096, 4096, 64),
    "small/64": (64, 256, 256, 0),
    "small/64/64": (64, 256, 256, 64),
}
BITS = {"int8": 8, "int4": 4}


def _group(case: Case) -> int:
    """The numbers of a row that share a scale."""
    _, _, columns, group = case.sizes
    return group or (columns if case.dtype == "int8" else 32)


def _make(case: Case) -> list[Any]:
    """fp32 activations, and the integers and scales of a weight."""
    tokens, rows, columns, group = case.sizes
    weight = case.random(rows, columns, dtype=torch.float32, grad=False)
    return [case.random(tokens, columns, dtype=torch.float32, grad=False), *quantize(weight, BITS[case.dtype], group or None)]


def _work(case: Case, direction: str) -> Work:
    _, rows, columns, _ = case.sizes
    return linear_work(case, direction, activation=4.0, scales=4.0 * rows * (columns // _group(case)))


def _dequantized(dtype: torch.dtype) -> Callable[[list[Any]], list[Any]]:
    def prepare(inputs: list[Any]) -> list[Any]:
        x, stored, scale = inputs
        return [x.to(dtype), dequantize(stored, scale, x.shape[-1]).to(dtype)]

    return prepare


def _torch_int8() -> Function:
    return torch._weight_int8pack_mm


def _one_scale(inputs: list[Any]) -> list[Any]:
    x, stored, scale_N1 = inputs
    return [x, stored, scale_N1.squeeze(-1)]


def _torch_int4() -> Function:
    return torch._weight_int4pack_mm_for_cpu


def _packed(inputs: list[Any]) -> list[Any]:
    """x, the weight as torch lays four bits out for this processor, the group, and a scale and a 0 for each group and row."""
    x, stored, scale_NG = inputs
    rows, groups = scale_NG.shape
    blocks = stored.view(rows, -1, 1, 16)
    integers = torch.cat((blocks & 15, blocks >> 4), 2).view(rows, -1).int()
    scale_GN = scale_NG.t().contiguous()
    scales_and_zeros = torch.stack((scale_GN, torch.zeros_like(scale_GN)), -1)
    return [x, torch._convert_weight_to_int4pack_for_cpu(integers, 1), x.shape[-1] // groups, scales_and_zeros]


LINEAR_QUANTIZED = Operator(
    "linear_quantized",
    axes="tokens x rows x columns of the weight x numbers that share a scale (0: a row for int8, 32 for int4)",
    formula="fp32 x, the stored integers and their fp32 scales are read, y written; 2 flops a token and weight",
    shapes=SHAPES,
    make=_make,
    ours=linear_quantized,
    work=_work,
    peers=(
        plain(reference.linear_quantized),
        compiled(reference.linear_quantized),
        Peer("torch_int8", _torch_int8, _one_scale, devices=("cpu",), dtypes=("int8",), suits=lambda case: case.sizes[3] == 0),
        Peer("torch_int4", _torch_int4, _packed, devices=("cpu",), dtypes=("int4",)),
        Peer("torch_bf16", lambda: functional, _dequantized(torch.bfloat16)),
        Peer("torch_float32", lambda: functional, _dequantized(torch.float32)),
    ),
    dtypes=("int8", "int4"),
    directions=("fwd",),
    on_request=frozenset({"llama13b/decode"}),
    devices=("cpu",),
)
