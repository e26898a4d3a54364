"""The operators on an Ascend NPU: our own kernel (ascend.py) where there is one, else torch_npu's fused operator.

An operator that neither has is refused, so that the choice among backends falls to the reference and says so.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyalpaca.ops import ascend, cpp, reference

# What of torch_npu serves an operator.
_TORCH_NPU = {
    "rms_norm": "npu_rms_norm",
    "rope": "npu_rotary_mul",
    "flash_attention": "npu_fusion_attention",
    "flash_attention_packed": "npu_fusion_attention",  # a call a sequence
}


@functools.cache
def problem() -> str | None:
    """Why no NPU can be used here, or None if one can."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed; `pip install pyalpaca[npu]` on a machine with an Ascend NPU"
    if not _torch_npu().npu.is_available():
        return "torch_npu finds no Ascend NPU; check the driver with `npu-smi info`"
    return None


def refusal(operator: str, x: Tensor) -> str | None:
    """Why this backend can't serve `operator` on tensors like `x`, or None if it can."""
    trouble = problem()
    if trouble is not None:
        return trouble
    if x.device.type != "npu":
        return f"the tensors are on {x.device.type}, expected npu"
    return None if ascend.refusal(operator, x) is None else _torch_npu_refusal(operator, x)


def _torch_npu_refusal(operator: str, x: Tensor) -> str | None:
    """Why torch_npu's own operator can't serve."""
    name = _TORCH_NPU.get(operator)
    if name is not None and not hasattr(_torch_npu(), name):
        return f"torch_npu {getattr(_torch_npu(), '__version__', '')} has no {name}"
    if operator in ("flash_attention", "flash_attention_packed") and x.dtype not in (torch.float16, torch.bfloat16):
        return f"the tensors are {x.dtype}, torch_npu's attention takes float16 and bfloat16"
    return None


def description(operator: str, x: Tensor) -> str:
    """Which of the two serves `operator` on tensors like `x`, and why; only for what is not refused."""
    why = ascend.refusal(operator, x)
    if why is None:
        info = ascend.build_info() or {}
        return f"our kernel for {info.get('soc', 'this NPU')}, built with torch_npu {info.get('torch_npu', '')}"
    if operator not in _TORCH_NPU:
        return "plain torch on the NPU"
    return f"torch_npu's {_TORCH_NPU[operator]}, because {why}"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if ascend.refusal("rms_norm", x) is None:
        return cpp.rms_norm(x, weight, eps)
    y: Tensor = _torch_npu().npu_rms_norm(x, weight.to(x.dtype), epsilon=eps)[0]
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if ascend.refusal("add_rms_norm", x) is None:
        return cpp.add_rms_norm(x, residual, weight, eps)
    # torch_npu's own npu_add_rms_norm has no gradient.
    total = x + residual
    return rms_norm(total, weight, eps), total


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if ascend.refusal("swiglu", gate) is None:
        return cpp.swiglu(gate, up)
    # torch_npu's own npu_swiglu wants both in one tensor: bringing them there costs what it saves.
    return torch.nn.functional.silu(gate) * up


def rope(x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if ascend.refusal("rope", x_BSHd) is None:
        return cpp.rope(x_BSHd, cos, sin)

    def whole(angle: Tensor) -> Tensor:
        doubled = torch.cat((angle, angle), dim=-1).unsqueeze(-2).to(x_BSHd.dtype)
        return doubled if doubled.dim() == 4 else doubled[None]

    y: Tensor = _torch_npu().npu_rotary_mul(x_BSHd, whole(cos), whole(sin), rotary_mode="half")
    return y


def rope_qk(q_BSHd: Tensor, k_BSKd: Tensor, cos: Tensor, sin: Tensor, positions_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    if ascend.refusal("rope_qk", q_BSHd) is None:
        return cpp.rope_qk(q_BSHd, k_BSKd, cos, sin, positions_BS)
    if positions_BS is not None:
        cos, sin = cos[positions_BS], sin[positions_BS]
    return rope(q_BSHd, cos, sin), rope(k_BSKd, cos, sin)


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
    if ascend.refusal("rope_qk_store", q_BSHd) is None:
        return cpp.rope_qk_store(q_BSHd, k_BSKd, v_BSKd, cos, sin, positions_BS, slots_BS, k_cache, v_cache)
    q, k = rope_qk(q_BSHd, k_BSKd, cos, sin, positions_BS)
    reference.store_rows(slots_BS, k, k_cache, v_BSKd, v_cache)
    return q, k


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
    reference.adamw_(weights, grads, exp_avgs, exp_avg_sqs, copies, weight_decays, step, lr, beta1, beta2, eps, grad_scale)


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    # Each in fp32: an NPU has no fp64 to speak of.
    return torch.stack(torch._foreach_norm([grad.detach().float() for grad in grads])).double().square().sum().sqrt()


def lora_merge(weight: Tensor, factors: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    return reference.lora_merge(weight, factors)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return reference.linear(x, weight)


def linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    return reference.linear_dx(dy, weight)


def linear_dweight(dy: Tensor, x: Tensor) -> Tensor:
    return reference.linear_dweight(dy, x)


def linear_dweight_add_(total: Tensor, dy: Tensor, x: Tensor) -> None:
    reference.linear_dweight_add_(total, dy, x)


def linear_dweight_split(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return reference.linear_dweight_split(dy, x)


def linear_dweight_add_split_(total: Tensor, lower: Tensor, dy: Tensor, x: Tensor, last: bool) -> None:
    reference.linear_dweight_add_split_(total, lower, dy, x, last)


def logit_sums(logits_TV: Tensor, labels_T: Tensor, start: int) -> Tensor:
    return reference.logit_sums(logits_TV, labels_T, start)


def logit_loss_(
    logits_TV: Tensor, labels_T: Tensor, start: int, sums_3T: Tensor, scale: float | Tensor, gradient: bool
) -> Tensor:
    return reference.logit_loss_(logits_TV, labels_T, start, sums_3T, scale, gradient)


def linear_quantized(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return reference.linear_quantized(x, weight, scale)


def flash_attention(
    q_BSHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, causal: bool, q_offset: int, scale: float
) -> tuple[Tensor, Tensor]:
    if ascend.refusal("flash_attention", q_BSHd) is None:
        return cpp.flash_attention(q_BSHd, k_BTKd, v_BTKd, causal, q_offset, scale)
    num_queries, num_keys = q_BSHd.shape[1], k_BTKd.shape[1]
    if num_keys == 0 or (causal and q_offset < 0):  # rows that see no key: torch_npu gives them the mean of all values
        return reference.flash_attention(q_BSHd, k_BTKd, v_BTKd, causal, q_offset, scale)
    mask: dict[str, Any] = {}
    if causal and num_queries == num_keys and q_offset == 0:
        mask = _triangle(q_BSHd)
    elif causal:
        last_key = torch.arange(num_queries, device=q_BSHd.device)[:, None] + q_offset
        mask = {"atten_mask": torch.arange(num_keys, device=q_BSHd.device) > last_key}
    out, maximum, total, *_ = _torch_npu().npu_fusion_attention(
        q_BSHd, k_BTKd, v_BTKd, q_BSHd.shape[2], "BSND", scale=scale, **mask
    )
    # Both statistics come as (B, H, S, 8), the last dimension eight copies.
    return out, (maximum + total.log())[..., 0]


def flash_attention_packed(
    q_NHd: Tensor, k_MKd: Tensor, v_MKd: Tensor, q_starts: Sequence[int], kv_starts: Sequence[int], causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    if ascend.refusal("flash_attention_packed", q_NHd) is None:
        return cpp.flash_attention_packed(q_NHd, k_MKd, v_MKd, q_starts, kv_starts, causal, scale)
    return reference.one_by_one(flash_attention, q_NHd, k_MKd, v_MKd, q_starts, kv_starts, causal, scale)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, length: int, scale: float
) -> Tensor:
    if refusal("flash_attention", q) is not None:
        return reference.cached_attention(q, k, v, k_scales, v_scales, length, scale)
    k, v = (reference.cached(x, scales, length).to(q.dtype) for x, scales in ((k, k_scales), (v, v_scales)))
    return flash_attention(q, k, v, True, length - q.shape[1], scale)[0]


def store_cache(x: Tensor, cache: Tensor, scales: Tensor | None, start: int) -> None:
    reference.store_cache(x, cache, scales, start)


def flash_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Probabilities are exp(score - maximum) / total to torch_npu: a logsumexp is a maximum whose total is 1.
    statistic = lse.float().unsqueeze(-1).expand(*lse.shape, 8).contiguous()
    dq, dk, dv, *_ = _torch_npu().npu_fusion_attention_grad(
        *(q, k, v, dout, q.shape[2], "BSND"),
        softmax_max=statistic,
        softmax_sum=torch.ones_like(statistic),
        attention_in=out,
        scale_value=scale,
        **(_triangle(q) if causal else {}),
    )
    return dq, dk, dv


def _triangle(q: Tensor) -> dict[str, Any]:
    """The upper-left causal mask, sparse_mode 2, which wants this very mask whatever the lengths are."""
    return {"atten_mask": torch.ones(2048, 2048, dtype=torch.bool, device=q.device).triu(1), "sparse_mode": 2}


@functools.cache
def _torch_npu() -> Any:
    return importlib.import_module("torch_npu")
