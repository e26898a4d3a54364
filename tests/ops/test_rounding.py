"""Results in bf16 are rounded to nearest, ties to even, every value of fp32 alike: subnormal ones, infinities and NaN too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ops_cases import backends_here
from torch import Tensor

from pyalpaca.ops import rope, swiglu

pytestmark = pytest.mark.skipif("cpp" not in backends_here(), reason="the extension is not built")
HEAD_DIM = 256


def patterns() -> Tensor:
    """fp32 with every upper half of 16 bits, beside lower halves at, below and above a tie, and at the ends."""
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0xC000], dtype=np.uint32)
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    return torch.from_numpy((upper[:, None] | lower).reshape(-1).view(np.float32))


def through_rope(x: Tensor) -> Tensor:
    """x in bf16: 1 turned by a "cosine" x and a sine of 0."""
    cos = x.view(-1, HEAD_DIM // 2)
    ones = torch.zeros(1, len(cos), 1, HEAD_DIM, dtype=torch.bfloat16)
    ones[..., : HEAD_DIM // 2] = 1
    return rope(ones, cos, torch.zeros_like(cos))[..., : HEAD_DIM // 2].reshape(-1)


def check(x: Tensor) -> None:
    found, expected = through_rope(x), x.to(torch.bfloat16)
    nan = x.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


def test_all_kinds_of_values_side_by_side() -> None:
    check(patterns())


def test_values_of_one_kind_beside_one_subnormal() -> None:
    """What is rounded together with a subnormal value, at any place, is rounded no other way than without it."""
    x = torch.linspace(-3.0, 3.0, 64 * HEAD_DIM).view(-1, HEAD_DIM // 2).clone()
    places = torch.arange(len(x))
    x[places, places % (HEAD_DIM // 2)] = torch.where(places % 3 == 0, 1e-40, -3e-39)
    check(x.view(-1))


def test_a_gate_is_never_far_from_the_exact_one() -> None:
    """From where it is the whole argument to where it is none of it; below -87.3 e^x is no normal number, and 0 will do."""
    x = torch.linspace(-87.0, 90.0, 1 << 16)
    exact = x.double() * torch.sigmoid(x.double())
    assert ((swiglu(x, torch.ones_like(x)).double() - exact).abs() <= 8e-6 * exact.abs()).all()
    near = x.abs() <= 8
    assert ((swiglu(x, torch.ones_like(x)).double() - exact).abs() <= 1e-6 * exact.abs())[near].all()
    assert swiglu(torch.tensor([-88.0, -1e30]), torch.ones(2)).abs().max() < 1e-36
