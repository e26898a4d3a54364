"""A few tokens times a weight of integers, where an instruction set may take x apart into digits: what that must not change."""

from __future__ import annotations

import pytest
import torch
from ops_cases import DTYPES, TOLERANCE, assert_near, backends_here, random
from torch import Tensor

from pyalpaca.ops import backend, dequantize, linear_quantized, quantize

pytestmark = pytest.mark.skipif("cpp" not in backends_here(), reason="the extension is not built")
KINDS = [(8, None), (8, 32), (8, 64), (8, 256), (4, 32), (4, 64), (4, 128), (4, 256)]


def product(x: Tensor, stored: Tensor, scale: Tensor) -> Tensor:
    with backend("cpp"):
        return linear_quantized(x, stored, scale)


def one_huge(width: int) -> Tensor:
    x = random(1, width) * 1e-3
    x[0, width // 2] = 1e4
    return x


EXTREMES = {
    "equal": lambda width: torch.full((1, width), 0.7),
    "zero": lambda width: torch.zeros(1, width),
    "one huge among small ones": one_huge,
    "digits of 127 and -128": lambda width: torch.tensor([0x7F7F7F, -0x7F7F7F, 0x7F7F80, -0x808080 / 2]).repeat(1, width)[
        :, :width
    ],
    "wide range": lambda width: random(1, width) * torch.linspace(-100, 100, width).exp2(),
    "near the largest": lambda width: random(1, width) * 1e34,
    "near the smallest": lambda width: random(1, width) * 1e-34,
    "subnormal": lambda width: random(1, width) * 1e-40,
}


@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("kind", EXTREMES)
def test_extreme_values_are_as_near_as_in_fp32(bits: int, group: int | None, kind: str) -> None:
    for width in (33, 300, 1100):
        stored, scale = quantize(random(17, width) * (1 if kind != "subnormal" else 1e4), bits, group)
        x = EXTREMES[kind](width)
        expected = x.double() @ dequantize(stored, scale, width).double().T
        unit = expected.abs().max().clamp_min(1e-300)
        assert_near(product(x, stored, scale).double() / unit, expected / unit, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_a_huge_number_blurs_no_other_chunk(bits: int, group: int | None) -> None:
    weight, x = random(13, 700), random(1, 700)
    weight[:, :128], x[0, 5] = 0, 1e7
    stored, scale = quantize(weight, bits, group)
    expected = x.double() @ dequantize(stored, scale, 700).double().T
    assert_near(product(x, stored, scale), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_is_the_same_alone_and_among_others(bits: int, group: int | None, dtype: torch.dtype) -> None:
    """Also beside tokens that are not finite, whose infinities and NaN stay theirs; and on any number of threads."""
    stored, scale = quantize(random(203, 1030), bits, group)
    x = random(8, 1030, dtype=dtype)
    alone = torch.cat([product(row[None], stored, scale) for row in x])
    x[2, 1029], x[5, 0] = float("inf"), float("nan")
    kept = [0, 1, 3, 4, 6, 7]
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found = product(x, stored, scale)
            assert not torch.isfinite(found[[2, 5]]).any()
            assert torch.equal(found[kept], alone[kept])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_tokens_and_odd_widths(bits: int, group: int | None, dtype: torch.dtype) -> None:
    for tokens, inputs in enumerate((1, 31, 32, 63, 65, 127, 129, 500, 96), 1):
        outputs = 5 * tokens - 4  # lines by twelve, by four, one by one
        stored, scale = quantize(random(outputs, inputs), bits, group)
        x = random(tokens, inputs, dtype=dtype)
        assert_near(product(x, stored, scale), x.double() @ dequantize(stored, scale, inputs).double().T, TOLERANCE[dtype])
