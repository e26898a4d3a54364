"""Weights as integers: what they stand for, how near that is, and products with them on every backend."""

from __future__ import annotations

import pytest
import torch
from ops_cases import DTYPES, TOLERANCE, assert_near, backends_here, not_contiguous, random

from pyalpaca.ops import GROUPS, backend, dequantize, linear, linear_quantized, quantize

BACKENDS = backends_here()
KINDS = [(8, None), (8, 64), (4, 32), (4, 64), (4, 256)]


@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("width", [1, 31, 32, 100, 257])
def test_a_number_is_off_by_half_a_step_of_its_group(bits: int, group: int | None, width: int) -> None:
    weight = random(9, width)
    stored, scale = quantize(weight, bits, group)
    assert stored.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert scale.shape == (9, -(-width // group) if group else 1)
    error = (dequantize(stored, scale, width) - weight).abs()
    step = scale.abs().repeat_interleave(group or width, 1)[:, :width]
    # The one short end of the four-bit range may be cut by a step, and a shrunken range by a tenth of eight.
    assert (error <= step * (0.5001 if bits == 8 else 1.9)).all()
    assert (error <= step * 0.5001).float().mean() > 0.9


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_within_the_range_are_kept_as_they_are(bits: int) -> None:
    top = 127 if bits == 8 else 7
    weight = torch.arange(-top, top + 1).float().repeat(3, 30)[:, :96] * 0.25
    weight[:, ::32] = -0.25 * (127 if bits == 8 else 8)
    assert torch.equal(dequantize(*quantize(weight, bits, 32), 96), weight)
    zeros = torch.zeros(2, 40)
    assert torch.equal(dequantize(*quantize(zeros, bits), 40), zeros)


def test_four_bits_lie_as_in_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    weight = random(5, 96)
    stored, scale = quantize(weight, 4, 32)
    # A block of Q4_0 is its scale in fp16 and the same 16 bytes.
    halves = scale.half()
    blocks = torch.cat((halves.view(torch.uint8).view(5, 3, 2), stored.view(5, 3, 16)), -1).reshape(5, -1)
    theirs = torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q4_0))
    torch.testing.assert_close(theirs, dequantize(stored, halves.float(), 96))


@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_nearer_than_the_ranges_width_and_smaller_groups_are_nearer(bits: int) -> None:
    weight = random(64, 1024)
    errors = [((dequantize(*quantize(weight, bits, g), 1024) - weight).norm() / weight.norm()).item() for g in GROUPS]
    assert errors == sorted(errors)
    assert errors[0] < (0.006 if bits == 8 else 0.09)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("shape", [(1, 5, 32), (1, 130, 300), (2, 7, 31), (3, 4, 64), (5, 9, 257), (20, 33, 65), (130, 140, 300)])
def test_products_equal_those_with_the_weight_it_stands_for(
    name: str, dtype: torch.dtype, bits: int, group: int | None, shape: tuple[int, int, int]
) -> None:
    tokens, outputs, inputs = shape
    stored, scale = quantize(random(outputs, inputs), bits, group)
    weight = dequantize(stored, scale, inputs).double()
    x, dy = random(tokens, inputs, dtype=dtype).requires_grad_(), random(tokens, outputs, dtype=dtype)
    with backend(name):
        y = linear_quantized(x, stored, scale)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == dtype
    assert_near(y.detach(), x.detach().double() @ weight.T, TOLERANCE[dtype])
    assert_near(dx, dy.double() @ weight, TOLERANCE[dtype])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_strides_empty_shapes_and_what_is_not_finite(name: str, bits: int) -> None:
    stored, scale = quantize(random(6, 70), bits, 32)
    x = random(2, 3, 70)
    with backend(name):
        expected = linear_quantized(x, stored, scale)
        strided = [not_contiguous(t) for t in (x, stored, scale)]
        torch.testing.assert_close(linear_quantized(*strided), expected)
        assert linear_quantized(x[:0], stored, scale).shape == (0, 3, 6)
        assert linear_quantized(x, stored[:0], scale[:0]).shape == (2, 3, 0)
        x[0, 1, 69], x[1, 2, 3] = float("inf"), float("nan")
        found = linear_quantized(x, stored, scale)
    broken = ~torch.isfinite(found).all(-1)
    assert broken.tolist() == [[False, True, False], [False, False, True]]
    torch.testing.assert_close(found[~broken], expected[~broken])


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_a_sum_of_gradients_grows_where_it_lies() -> None:
    from pyalpaca.ops import linear_dweight_add_

    total, dy, x = random(40, 50), random(30, 40, dtype=torch.bfloat16), random(30, 50, dtype=torch.bfloat16)
    expected = total.double() + dy.double().T @ x.double()
    linear_dweight_add_(total, dy, x)
    assert_near(total, expected, TOLERANCE[torch.float32])


def test_what_can_not_be_quantised_is_refused() -> None:
    with pytest.raises(ValueError, match="found 3 bits in groups of None, expected 4 or 8 in groups of 32, 64, 128, 256"):
        quantize(random(2, 32), 3)
    with pytest.raises(ValueError, match="found 4 bits in groups of 48"):
        quantize(random(2, 96), 4, 48)
    for bits in (4, 8):
        for bad in (float("nan"), float("inf")):
            weight = random(4, 64)
            weight[2, 3] = bad
            with pytest.raises(ValueError, match="holds infinities or NaN, expected finite numbers"):
                quantize(weight, bits)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_wrong_arguments_are_named() -> None:
    stored, scale = quantize(random(6, 64), 4, 32)
    with pytest.raises(ValueError, match="weight has rows of 32 bytes, expected 48 for 96 numbers"):
        torch.ops.pyalpaca.linear_quantized(random(2, 96), stored, scale, 32)
    with pytest.raises(ValueError, match=r"scale has shape \[6, 2\], expected \[6, 1\]"):
        torch.ops.pyalpaca.linear_quantized(random(2, 64), stored, scale, 64)
    with pytest.raises(ValueError, match="group is 8, expected a multiple of 32"):
        torch.ops.pyalpaca.linear_quantized(random(2, 64), stored, scale, 8)


def test_the_product_is_as_far_from_the_original_as_the_weight() -> None:
    x, weight = random(4, 512), random(300, 512)
    exact = linear(x, weight)
    for bits, largest in ((8, 0.01), (4, 0.09)):
        found = linear_quantized(x, *quantize(weight, bits))
        assert (found - exact).norm() / exact.norm() < largest
