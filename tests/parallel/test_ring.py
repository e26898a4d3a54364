"""Ring attention over several ranks is attention over the whole sequence, forward and backward."""

from __future__ import annotations

import pytest
import torch
from launch import launch
from torch import Tensor
from workers import ring

from pyalpaca.ops import flash_attention, flash_attention_backward, flash_attention_lse
from pyalpaca.parallel import ring_positions


def inputs(heads: int, kv_heads: int, length: int) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, h, 8) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


CASES = {
    "fp64": (inputs(4, 4, 24), torch.float64, 1e-12),
    "fp32, grouped heads": (inputs(4, 2, 48), torch.float32, 1e-5),
    "bf16": (inputs(2, 1, 24), torch.bfloat16, 3e-2),
    "fp32, a position in a chunk": (inputs(2, 2, 12), torch.float32, 1e-5),
}


@pytest.mark.parametrize("ranks", [2, 3])
def test_ring_attention_is_attention(ranks: int) -> None:
    found = launch(ranks, ring, [[x.to(dtype) for x in whole] for whole, dtype, _ in CASES.values()])
    for number, (name, (whole, dtype, tolerance)) in enumerate(CASES.items()):
        q, k, v, dout = (x.to(dtype).double().clone().requires_grad_() for x in whole)
        expected = flash_attention(q, k, v)
        expected.backward(dout.detach())
        for rank, parts in enumerate(found):
            at = ring_positions(q.shape[1], rank, ranks)
            for part, right in zip(parts[number], (expected, q.grad, k.grad, v.grad), strict=True):
                assert right is not None
                torch.testing.assert_close(
                    part.double(), right.detach()[:, at], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_every_position_belongs_to_one_rank_and_the_ranks_see_as_many_keys() -> None:
    parts = [ring_positions(48, rank, 4) for rank in range(4)]
    assert sorted(torch.cat(parts).tolist()) == list(range(48))
    assert len({int((part + 1).sum()) for part in parts}) == 1


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_that_the_keys_give_part_by_part_add_up(causal: bool) -> None:
    q, k, v, dout = (x.float() for x in inputs(4, 2, 24))
    expected, lse = flash_attention_lse(q, k, v, causal=causal)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-6)):
        given = [x.to(dtype) for x in (dout, q, k, v, expected)]
        leaves = [x.clone().requires_grad_() for x in given[1:4]]
        flash_attention(*leaves, causal=causal).backward(given[0])
        for found, leaf in zip(flash_attention_backward(*given, lse, causal=causal), leaves, strict=True):
            torch.testing.assert_close(found, leaf.grad, atol=tolerance, rtol=tolerance)
