"""torch_npu's operators as peers: given what its documentation asks for, they compute what ours compute; stand-ins on CPU."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pyalpaca.bench.kernels.measure import prepared, skipped
from pyalpaca.bench.kernels.operator import Case, Operator, Peer
from pyalpaca.bench.kernels.records import OPERATORS
from pyalpaca.ops import backend


def npu_rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    assert gamma.dtype == self.dtype
    rstd = torch.rsqrt(self.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (self.float() * rstd * gamma.float()).to(self.dtype), rstd


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    return *npu_rms_norm(x1 + x2, gamma, epsilon), x1 + x2


def npu_rotary_mul(self: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    assert rotary_mode == "half" and r1.dim() == r2.dim() == self.dim() and r1.dtype == self.dtype
    first, second = self.chunk(2, -1)
    return self * r1 + torch.cat((-second, first), -1) * r2


def npu_swiglu(self: Tensor, dim: int = -1) -> Tensor:
    gate, up = self.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(self.dtype)


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    atten_mask: Tensor,
    scale: float = 1.0,
    sparse_mode: int = 0,
) -> tuple[Any, ...]:
    assert input_layout == "BSND" and head_num == query.shape[2] and sparse_mode == 2
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert torch.equal(atten_mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    length = query.shape[1]
    hidden = torch.full((length, length), -math.inf).triu(1)
    return _attention(*(x.transpose(1, 2) for x in (query, key, value)), hidden, scale).transpose(1, 2), None, None, None, 0, 0, 0


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int = 1,
    scale: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
) -> tuple[Tensor, Tensor]:
    assert input_layout == "BNSD" and query.shape[1:3] == (num_heads, 1) and key.shape[1] == num_key_value_heads
    assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    return _attention(query, key, value, torch.zeros(()), scale), torch.zeros(())


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).float() for x in (k, v))
    return ((q.float() @ k.mT * scale + mask).softmax(-1) @ v).to(q.dtype)


STAND_INS = (npu_rms_norm, npu_add_rms_norm, npu_rotary_mul, npu_swiglu, npu_fusion_attention, npu_fused_infer_attention_score)


@pytest.fixture(autouse=True)
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torch_npu")
    for function in STAND_INS:
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "torch_npu", module)


def peers() -> Iterator[Any]:
    for operator in OPERATORS.values():
        for peer in operator.peers:
            if peer.name == "torch_npu":
                for dtype in peer.dtypes or operator.dtypes:
                    yield pytest.param(operator, peer, dtype, id=f"{operator.name}-{dtype}")


@pytest.mark.parametrize(("operator", "peer", "dtype"), [*peers()])
def test_it_computes_the_same(operator: Operator, peer: Peer, dtype: str) -> None:
    torch.manual_seed(3)
    small = next(sizes for label, sizes in operator.shapes.items() if label.startswith("small/"))
    inputs = operator.make(Case(small, dtype))
    with backend("reference"):
        expected = prepared(operator.ours, inputs, "fwd")()
    found = prepared(peer.build(), peer.prepare(inputs), "fwd")()
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]  # type: ignore[call-overload]
    for x, y in pairs:
        tolerance = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.004}[dtype] * y.double().abs().max()
        assert x.shape == y.shape and x.dtype == y.dtype and (x.double() - y.double()).abs().max() <= tolerance


def test_it_is_taken_on_an_npu_alone_where_the_operator_runs_there() -> None:
    for operator, peer, dtype in (param.values for param in peers()):
        assert "npu" in operator.devices
        case = Case(next(iter(operator.shapes.values())), dtype)
        assert not peer.takes(case, "fwd") and peer.takes(Case(case.sizes, dtype, "npu"), "fwd")


def test_who_has_no_torch_npu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch_npu")
    operators = [OPERATORS["rms_norm"], OPERATORS["cached_attention"]]
    assert [(peer.name, modules) for peer, modules in skipped(operators, ["plain", "torch_npu"], "npu")] == [
        ("torch_npu", ["torch_npu"])
    ]
    assert skipped(operators, ["torch_npu"], "cpu") == []
