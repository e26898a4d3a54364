"""The operators in C++ (csrc/), through torch's dispatcher; their gradients are registered there too."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pyalpaca.ops import extension
from pyalpaca.ops.quantize import group_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ATTENTION = ("flash_attention", "flash_attention_packed", "cached_attention", "store_cache")


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
    if operator in _ATTENTION and (head_dim % 8 != 0 or not 0 < head_dim <= 256):
        return f"head_dim is {head_dim}, the C++ kernel takes multiples of 8 up to 256"
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y: Tensor = torch.ops.pyalpaca.rms_norm.default(x, weight, eps)[0]
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, total, _ = torch.ops.pyalpaca.add_rms_norm.default(x, residual, weight, eps)
    return y, total


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y: Tensor = torch.ops.pyalpaca.swiglu.default(gate, up)
    return y


def rope(x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y: Tensor = torch.ops.pyalpaca.rope.default(x_BSHd, cos, sin)
    return y


def rope_qk(q_BSHd: Tensor, k_BSKd: Tensor, cos: Tensor, sin: Tensor, positions_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k = torch.ops.pyalpaca.rope_qk.default(q_BSHd, k_BSKd, cos, sin, positions_BS)
    return q, k


def rope_qk_store(
    q_BSHd: Tensor,
    k_BSKd: Tensor,
    v_BSKd: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_BS: Tensor | None,
    slots_BS: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> tuple[Tensor, Tensor]:
    q, k = torch.ops.pyalpaca.rope_qk_store.default(q_BSHd, k_BSKd, v_BSKd, cos, sin, positions_BS, slots_BS, k_cache, v_cache)
    return q, k


@torch.no_grad()
def adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    weight_decays: Sequence[float],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: float,
) -> None:
    torch.ops.pyalpaca.adamw_.default(
        weights, grads, exp_avgs, exp_avg_sqs, copies, weight_decays, step, lr, beta1, beta2, eps, grad_scale
    )


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.ops.pyalpaca.grad_norm.default(grads)
    return norm


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, length: int, scale: float
) -> Tensor:
    out: Tensor = torch.ops.pyalpaca.cached_attention.default(q, k, v, k_scales, v_scales, length, scale)
    return out


def store_cache(x: Tensor, cache: Tensor, scales: Tensor | None, start: int) -> None:
    torch.ops.pyalpaca.store_cache.default(x, cache, scales, start)


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


def linear_dweight_add_(total: Tensor, dy: Tensor, x: Tensor) -> None:
    torch.ops.pyalpaca.linear_dweight_add_.default(total, dy, x)


def linear_dweight_split(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    total, lower = torch.ops.pyalpaca.linear_dweight_split.default(dy, x)
    return total, lower


def linear_dweight_add_split_(total: Tensor, lower: Tensor, dy: Tensor, x: Tensor, last: bool) -> None:
    torch.ops.pyalpaca.linear_dweight_add_split_.default(total, lower, dy, x, last)


def logit_sums(logits_TV: Tensor, labels_T: Tensor, start: int) -> Tensor:
    sums_3T: Tensor = torch.ops.pyalpaca.logit_sums.default(logits_TV, labels_T, start)
    return sums_3T


def logit_loss_(
    logits_TV: Tensor, labels_T: Tensor, start: int, sums_3T: Tensor, scale: float | Tensor, gradient: bool
) -> Tensor:
    operator = torch.ops.pyalpaca.logit_loss_.default
    losses_T: Tensor = operator(logits_TV, labels_T, start, sums_3T, float(scale), gradient)
    return losses_T


def linear_quantized(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    y: Tensor = torch.ops.pyalpaca.linear_quantized.default(x, weight, scale, group_of(x.shape[-1], scale.shape[1]))
    return y


def flash_attention(
    q_BSHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, causal: bool, q_offset: int, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse_BHS = torch.ops.pyalpaca.flash_attention.default(q_BSHd, k_BTKd, v_BTKd, causal, q_offset, scale)
    return out, lse_BHS


def flash_attention_packed(
    q_NHd: Tensor, k_MKd: Tensor, v_MKd: Tensor, q_starts: Sequence[int], kv_starts: Sequence[int], causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    starts = [torch.tensor(numbers).to(q_NHd.device, non_blocking=True) for numbers in (q_starts, kv_starts)]
    longest = [max(end - begin for begin, end in pairwise(numbers)) for numbers in (q_starts, kv_starts)]
    out, lse = torch.ops.pyalpaca.flash_attention_packed.default(q_NHd, k_MKd, v_MKd, *starts, *longest, causal, scale)
    return out, lse


def flash_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.ops.pyalpaca.flash_attention_backward.default(dout, q, k, v, out, lse, causal, 0, scale)
    return dq, dk, dv
