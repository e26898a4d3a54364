"""The operators in C++ (csrc/), through torch's dispatcher; their gradients are registered there too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyalpaca.ops import extension

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(operator: str, x: Tensor) -> str | None:
    """Why this backend can't serve `operator` on tensors like `x`, or None if it can."""
    problem = extension.problem()
    if problem is not None:
        return problem
    if x.device.type not in ("cpu", "meta"):
        return f"the tensors are on {x.device.type}, the C++ kernels run on cpu"
    if x.dtype not in _DTYPES:
        return f"the tensors are {x.dtype}, the C++ kernels take float32, bfloat16 and float16"
    head_dim = x.shape[-1]
    if operator == "flash_attention" and (head_dim % 8 != 0 or not 0 < head_dim <= 256):
        return f"head_dim is {head_dim}, the C++ kernel takes multiples of 8 up to 256"
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y: Tensor = torch.ops.pyalpaca.rms_norm.default(x, weight, eps)[0]
    return y


def rope(x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y: Tensor = torch.ops.pyalpaca.rope.default(x_BSHd, cos, sin)
    return y


def lora_merge(weight: Tensor, factors: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    merged: Tensor = torch.ops.pyalpaca.lora_merge.default(weight, *map(list, zip(*factors, strict=True)))
    return merged


def linear(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = torch.ops.pyalpaca.linear.default(x, weight)
    return y


def linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    dx: Tensor = torch.ops.pyalpaca.linear_dx.default(dy, weight)
    return dx


def linear_dweight(dy: Tensor, x: Tensor) -> Tensor:
    dweight: Tensor = torch.ops.pyalpaca.linear_dweight.default(dy, x)
    return dweight


def flash_attention(
    q_BSHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, causal: bool, q_offset: int, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse_BHS = torch.ops.pyalpaca.flash_attention.default(q_BSHd, k_BTKd, v_BTKd, causal, q_offset, scale)
    return out, lse_BHS


def flash_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.ops.pyalpaca.flash_attention_backward.default(dout, q, k, v, out, lse, causal, 0, scale)
    return dq, dk, dv
