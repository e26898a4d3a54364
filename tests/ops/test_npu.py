"""The NPU backend gives torch_npu what its operators want; a stand-in with their documented meaning computes on CPU."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ops_cases import random
from torch import Tensor

from pyalpaca.ops import npu, reference


def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    assert gamma.dtype == x.dtype
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    return x * rstd * gamma, rstd


def npu_rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half") -> Tensor:
    assert rotary_mode == "half" and cos.dim() == sin.dim() == x.dim()
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    sparse_mode: int = 0,
) -> tuple[Any, ...]:
    """Layout BSND; masks are true where hidden; sparse mode 2 is upper-left causal; statistics come eightfold."""
    assert input_layout == "BSND" and head_num == query.shape[2]
    length, keys, group = query.shape[1], key.shape[1], head_num // key.shape[2]
    q, k, v = query.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (key, value))
    scores = q @ k.transpose(-1, -2) * scale
    if sparse_mode == 2:
        assert atten_mask is not None and torch.equal(atten_mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
        atten_mask = torch.ones(length, keys, dtype=torch.bool).triu(1)
    if atten_mask is not None:
        assert atten_mask.shape == (length, keys)
        scores = scores.masked_fill(atten_mask, -math.inf)
    maximum = scores.amax(-1, keepdim=True)
    exponentials = torch.exp(scores - maximum)
    total = exponentials.sum(-1, keepdim=True)
    out = (exponentials / total @ v).transpose(1, 2)
    return out, maximum.expand(-1, -1, -1, 8), total.expand(-1, -1, -1, 8), None, 0, 0, 0


def npu_fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: Tensor | None = None,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    attention_in: Tensor,
    scale_value: float = 1.0,
    sparse_mode: int = 0,
) -> tuple[Any, ...]:
    """The same statistics as of the forward pass: probabilities are exp(score - softmax_max) / softmax_sum."""
    assert input_layout == "BSND" and head_num == query.shape[2] and sparse_mode == (0 if atten_mask is None else 2)
    q, dout, out = (x.transpose(1, 2) for x in (query, dy, attention_in))
    group = head_num // key.shape[2]
    k, v = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (key, value))
    p = torch.exp(q @ k.transpose(-1, -2) * scale_value - softmax_max[..., :1]) / softmax_sum[..., :1]
    if atten_mask is not None:
        p = p.tril()
    ds = p * (dout @ v.transpose(-1, -2) - (dout * out).sum(-1, keepdim=True)) * scale_value
    dk, dv = (x.unflatten(1, (-1, group)).sum(2).transpose(1, 2) for x in (ds.mT @ q, p.mT @ dout))
    return (ds @ k).transpose(1, 2), dk, dv, None


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = SimpleNamespace(
        npu_rms_norm=npu_rms_norm,
        npu_rotary_mul=npu_rotary_mul,
        npu_fusion_attention=npu_fusion_attention,
        npu_fusion_attention_grad=npu_fusion_attention_grad,
    )
    monkeypatch.setattr(npu, "_torch_npu", lambda: functions)


def test_rms_norm() -> None:
    x, weight = random(3, 5, 16), random(16)
    torch.testing.assert_close(npu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("batch", [(), (2,)], ids=["one_position", "position_per_batch"])
def test_rope(batch: tuple[int, ...]) -> None:
    x, angle = random(2, 5, 3, 8), random(*batch, 5, 4)
    found = npu.rope(x, angle.cos(), angle.sin())
    torch.testing.assert_close(found, reference.rope(x, angle.cos(), angle.sin()))


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "q_offset"),
    [(6, 6, True, 0), (6, 6, False, 0), (3, 9, True, 6), (1, 9, True, 8), (6, 6, True, 2), (5, 5, True, -2)],
)
def test_flash_attention(queries: int, keys: int, causal: bool, q_offset: int) -> None:
    q, k, v = random(2, queries, 4, 8), random(2, keys, 2, 8), random(2, keys, 2, 8, seed=1)
    found = npu.flash_attention(q, k, v, causal, q_offset, 0.3)
    for x, expected in zip(found, reference.flash_attention(q, k, v, causal, q_offset, 0.3), strict=True):
        torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_backward(causal: bool) -> None:
    q, k, v, dout = random(2, 6, 4, 8), random(2, 6, 2, 8), random(2, 6, 2, 8, seed=1), random(2, 6, 4, 8, seed=2)
    out, lse = reference.flash_attention(q, k, v, causal, 0, 0.3)
    found = npu.flash_attention_backward(dout, q, k, v, out, lse, causal, 0.3)
    for x, expected in zip(found, reference.flash_attention_backward(dout, q, k, v, out, lse, causal, 0.3), strict=True):
        torch.testing.assert_close(x, expected)


def test_half_types_only_for_attention() -> None:
    if npu.problem() is None:
        assert npu.refusal("flash_attention", torch.empty(1, 1, 1, 64, device="npu")) is not None
    else:
        assert "torch_npu" in str(npu.refusal("flash_attention", torch.empty(1, 1, 1, 64)))
