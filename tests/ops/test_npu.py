"""The NPU backend prefers our kernels and else gives torch_npu what its operators want; stand-ins compute on CPU."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ops_cases import random
from torch import Tensor

from pyalpaca.ops import ascend, extension, npu, npu_kernels, reference


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


def test_our_kernel_comes_first_then_torch_npu_s_then_none(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = random(3, 16), random(16)
    calls: list[str] = []
    monkeypatch.setattr(npu.cpp, "rms_norm", lambda x, weight, eps: calls.append("ours") or x)
    monkeypatch.setattr(npu, "problem", lambda: None)
    monkeypatch.setattr(ascend, "refusal", lambda operator, x: None)
    monkeypatch.setattr(ascend, "build_info", lambda: {"soc": "ascend910b2", "torch_npu": "2.13.0"})
    assert npu.rms_norm(x, weight, 1e-5) is x and calls == ["ours"]
    assert npu.description("rms_norm", x) == "our kernel for ascend910b2, built with torch_npu 2.13.0"
    monkeypatch.setattr(ascend, "refusal", lambda operator, x: "they were not built")
    torch.testing.assert_close(npu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert calls == ["ours"]
    assert npu.description("rms_norm", x) == "torch_npu's npu_rms_norm, because they were not built"
    on_npu: Any = SimpleNamespace(device=SimpleNamespace(type="npu"), dtype=torch.float16)
    assert npu.refusal("rms_norm", on_npu) is None
    monkeypatch.setattr(npu, "_torch_npu", lambda: SimpleNamespace(__version__="2.1.0"))
    assert npu.refusal("rms_norm", on_npu) == "torch_npu 2.1.0 has no npu_rms_norm"


@pytest.mark.skipif(extension.problem() is not None, reason="the extension, which has the schemas, is not built")
def test_what_our_kernels_do_not_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascend, "problem", lambda: None)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: name != "pyalpaca::lora_merge")
    cases = [
        ("rms_norm", (2, 8192), torch.float32, None),
        ("rms_norm", (2, 8193), torch.float32, "rows are 8193 long, our kernel takes up to 8192"),
        ("rms_norm", (2, 64), torch.float64, "the tensors are torch.float64, our kernel takes float16, bfloat16, float32"),
        ("rope", (1, 2, 3, 128), torch.bfloat16, None),
        ("rope", (1, 2, 3, 72), torch.bfloat16, "head_dim is 72, our kernel takes multiples of 16 up to 128"),
        ("flash_attention", (1, 2, 3, 128), torch.float16, None),
        ("flash_attention", (1, 2, 3, 72), torch.float16, "head_dim is 72, our kernel takes multiples of 16 up to 128"),
        ("flash_attention", (1, 2, 3, 64), torch.float32, "the tensors are torch.float32, our kernel takes float16, bfloat16"),
        ("flash_attention_packed", (2, 3, 128), torch.bfloat16, None),
        ("flash_attention_packed", (2, 3, 72), torch.float16, "head_dim is 72, our kernel takes multiples of 16 up to 128"),
        ("lora_merge", (2, 2), torch.float32, "there is no kernel of ours for it"),
    ]
    for operator, shape, dtype, expected in cases:
        assert ascend.refusal(operator, torch.empty(shape, dtype=dtype)) == expected
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: not name.endswith("backward"))
    q = torch.empty(1, 2, 3, 64, dtype=torch.float16, requires_grad=True)
    assert ascend.refusal("flash_attention", q) == "there is no kernel of ours for its gradient"
    with torch.no_grad():
        assert ascend.refusal("flash_attention", q) is None


def test_kernels_that_were_not_built_or_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascend, "problem", ascend.problem.__wrapped__)
    monkeypatch.setattr(ascend, "_BUILD_INFO", tmp_path / "info.json")
    assert npu_kernels()[0] is None and "our kernels were not built; install pyalpaca again" in str(npu_kernels()[1])
    (tmp_path / "info.json").write_text('{"torch": "2.5.1", "soc": "ascend910b1"}')
    monkeypatch.setattr(ascend.importlib.util, "find_spec", lambda name: object())
    assert f"built with torch 2.5.1, but torch {torch.__version__} is installed" in str(npu_kernels()[1])


def test_an_operator_that_the_extension_lacks_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascend, "problem", lambda: None)
    for operator in ("rms_norm", "no_such_operator"):  # no kernels for NPUs are loaded here, nor is there such a schema
        assert ascend.refusal(operator, torch.empty(2, 8)) == "there is no kernel of ours for it"
