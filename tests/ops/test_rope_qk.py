"""rope_qk on every backend equals rope of each in float64; rope_qk_store leaves in the caches what it returns."""

from __future__ import annotations

import pytest
import torch
from ops_cases import DTYPES, TOLERANCE, assert_near, backends_here, check_against_oracle, random
from torch import Tensor

from pyalpaca.ops import backend, rope, rope_qk, rope_qk_store

BACKENDS = backends_here()
SHAPES = [(1, 1, 1, 1, 2), (2, 5, 4, 2, 6), (2, 9, 4, 1, 64), (1, 33, 5, 5, 128), (1, 70, 20, 4, 80)]  # B, S, H, K, d


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    angle = random(*shape)
    return angle.cos(), angle.sin()


def fused(batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v as parts of one projection's result."""
    whole = random(batch, tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    parts = whole.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)
    return [part.unflatten(-1, (-1, head_dim)) for part in parts]


def flat(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> tuple[Tensor, ...]:
    """Both results in one tensor, so that a gradient comes to both."""
    return (torch.cat(rope_qk(q, k, cos, sin, positions), 2),)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_oracle(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    batch, tokens, *_, head_dim = shape
    q, k, _ = fused(*shape, dtype)
    check_against_oracle(name, flat, [q, k], angles(tokens, head_dim // 2))
    check_against_oracle(name, flat, [q, k.transpose(0, 1).contiguous().transpose(0, 1)], angles(batch, tokens, head_dim // 2))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_token_takes_the_angles_of_its_position(name: str, dtype: torch.dtype) -> None:
    q, k, _ = fused(2, 5, 4, 2, 16, dtype)
    cos, sin = angles(9, 8)
    positions = torch.tensor([[8, 0, 3, 3, 1], [0, 1, 2, 3, 4]])
    check_against_oracle(name, lambda *given: flat(*given, positions), [q, k], [cos, sin])
    with backend(name):
        turned = rope_qk(q, k, cos, sin, positions)
        assert all(torch.equal(x, rope(y, cos[positions], sin[positions])) for x, y in zip(turned, (q, k), strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_position", [False, True])
def test_keys_and_values_go_to_their_slots(name: str, dtype: torch.dtype, by_position: bool) -> None:
    q, k, v = fused(2, 3, 4, 2, 16, dtype)
    cos, sin = angles(9 if by_position else 3, 8)
    positions = torch.tensor([[5, 6, 7], [0, 1, 2]]) if by_position else None
    slots = torch.tensor([[4, -1, 9], [0, 1, 2]])
    caches = [torch.full((2, 5, 2, 16), 7.0, dtype=dtype) for _ in range(2)]
    with backend(name):
        turned_q, turned_k = rope_qk_store(q, k, v, cos, sin, slots, *caches, positions)
        assert all(torch.equal(x, y) for x, y in zip((turned_q, turned_k), rope_qk(q, k, cos, sin, positions), strict=True))
    for cache, x in zip(caches, (turned_k, v), strict=True):
        expected = torch.full((10, 2, 16), 7.0, dtype=dtype)
        expected[[4, 9, 0, 1, 2]] = x.flatten(0, 1)[[0, 2, 3, 4, 5]]
        assert torch.equal(cache.view(10, 2, 16), expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_tokens(name: str) -> None:
    q, cache = torch.empty(2, 0, 4, 8), torch.zeros(3, 4, 8)
    with backend(name):
        assert rope_qk(q, q, torch.empty(0, 4), torch.empty(0, 4))[1].shape == q.shape
        rope_qk_store(q, q, q, torch.empty(0, 4), torch.empty(0, 4), torch.empty(2, 0, dtype=torch.long), cache, cache.clone())
    assert not cache.any()


@pytest.mark.parametrize("name", BACKENDS)
def test_infinities_and_nan_stay_in_their_pair(name: str) -> None:
    q, k, _ = fused(1, 2, 2, 2, 32, torch.float32)
    q[0, 0, 1, 3], k[0, 1, 0, 30] = float("nan"), float("inf")
    check_against_oracle(name, flat, [q, k], angles(2, 16))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_every_derivative_exists_in_cpp() -> None:
    q, k = random(1, 3, 2, 8).requires_grad_(), random(1, 3, 1, 8).requires_grad_()
    cos, sin = angles(3, 4)
    seconds = []
    for name in ("cpp", "reference"):
        with backend(name):
            (dq,) = torch.autograd.grad(flat(q, k, cos, sin)[0].pow(3).sum(), q, create_graph=True)
            seconds.append(torch.autograd.grad(dq.sum(), q)[0])
    assert_near(seconds[0], seconds[1].double(), 4 * TOLERANCE[torch.float32])


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_wrong_arguments_are_named() -> None:
    q, k, v = fused(1, 3, 4, 2, 8, torch.float32)
    cos, sin = angles(3, 4)
    slots, cache = torch.tensor([[0, 1, 2]]), torch.zeros(5, 2, 8)
    with backend("cpp"):
        with pytest.raises(ValueError, match=r"k has shape .* expected that of q but for the number of heads"):
            rope_qk(q, k[:, :2], cos, sin)
        with pytest.raises(ValueError, match="positions hold 3, expected numbers below 3"):
            rope_qk(q, k, cos, sin, slots + 1)
        with pytest.raises(ValueError, match="positions hold -1, expected numbers below 3"):
            rope_qk(q, k, cos, sin, slots - 1)
        with pytest.raises(ValueError, match="slots hold 5, expected numbers below 5"):
            rope_qk_store(q, k, v, cos, sin, slots + 3, cache, cache.clone())
        with pytest.raises(ValueError, match=r"a cache has shape \[5, 3, 8\], expected contiguous \(\.\.\., 2, 8\)"):
            rope_qk_store(q, k, v, cos, sin, slots, torch.zeros(5, 3, 8), cache)
        with pytest.raises(ValueError, match="a cache is Half on cpu, expected that of k: Float on cpu"):
            rope_qk_store(q, k, v, cos, sin, slots, cache.half(), cache)
