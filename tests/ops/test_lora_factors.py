"""Merging LoRA factors: bit for bit what plain torch does, however the matrix is cut."""

from __future__ import annotations

import pytest
import torch
from ops_cases import DTYPES, backends_here, not_contiguous, random

from pyalpaca.ops import backend, lora_merge

pytestmark = pytest.mark.skipif("cpp" not in backends_here(), reason="the extension is not built")


def case(rows: int, columns: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return random(rows, columns, dtype=dtype), random(rows, rank, seed=1), random(rank, columns, seed=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 8, 64, 128])
@pytest.mark.parametrize("shape", [(64, 96), (97, 131), (33, 1000)], ids=str)
def test_equals_the_original_arithmetic_bit_for_bit(shape, rank, dtype):
    weight, b, a = case(*shape, rank, dtype)
    expected = (weight.float() + (b @ a) * 0.37).to(dtype)
    with backend("cpp"):
        assert torch.equal(lora_merge(weight, [(b, a, 0.37)]), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_rounds_after_each_pair(dtype):
    weight, b, a = case(40, 77, 8, dtype)
    pairs = [(b, a, 4.0), (random(40, 3, seed=3), random(3, 77, seed=4), 0.5)]
    expected = lora_merge(lora_merge(weight, pairs[:1]), pairs[1:])
    assert torch.equal(lora_merge(weight, pairs), expected)


def test_a_piece_of_the_result_is_the_result_of_the_piece():
    weight, b, a = case(50, 70, 8, torch.float16)
    whole = lora_merge(weight, [(b, a, 4.0)])
    assert torch.equal(lora_merge(weight[3:20], [(b[3:20], a, 4.0)]), whole[3:20])
    assert torch.equal(lora_merge(weight[:, 5:36], [(b, a[:, 5:36], 4.0)]), whole[:, 5:36])


def test_strides_empty_shapes_and_rank_zero():
    weight, b, a = case(9, 11, 3, torch.float32)
    strided = [not_contiguous(x) for x in (weight, b, a)]
    assert torch.equal(lora_merge(strided[0], [(strided[1], strided[2], 2.0)]), lora_merge(weight, [(b, a, 2.0)]))
    assert lora_merge(weight[:0], [(b[:0], a, 2.0)]).shape == (0, 11)
    assert torch.equal(lora_merge(weight, [(b[:, :0], a[:0], 2.0)]), weight)


def test_infinities_and_nan_come_through():
    weight, b, a = case(4, 9, 2, torch.float16)
    weight[0, 0], b[1, 0], a[0, 8] = float("inf"), float("nan"), float("-inf")
    with backend("reference"):
        expected = lora_merge(weight, [(b, a, 1.0)])
    torch.testing.assert_close(lora_merge(weight, [(b, a, 1.0)]), expected, equal_nan=True, rtol=0, atol=0)


def test_wrong_shapes_are_refused():
    weight, b, a = case(4, 6, 2, torch.float32)
    with pytest.raises(ValueError, match="lora_merge: b has shape"):
        lora_merge(weight, [(b[:3], a, 1.0)])
    with pytest.raises(ValueError, match="expected a float32 matrix"):
        lora_merge(weight, [(b.half(), a, 1.0)])
