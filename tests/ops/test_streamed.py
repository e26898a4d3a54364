"""Results too large for the cache are written past it: bit by bit what the same rows give where they are few."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from ops_cases import DTYPES, backends_here, random
from torch import Tensor

from pyalpaca.bench.kernels.device import last_level_cache
from pyalpaca.ops import add_rms_norm, extension, rms_norm, rope, rope_qk, rope_qk_store, swiglu

pytestmark = pytest.mark.skipif("cpp" not in backends_here(), reason="the extension is not built")
HEADS, HEAD_DIM = 16, 128
WIDTH = HEADS * HEAD_DIM


def large(dtype: torch.dtype) -> int:
    """Rows of WIDTH values that fill the last cache, of which half is enough."""
    cache: int = extension.module().last_level_cache()
    if cache > 256 << 20:
        pytest.skip("the results would be too large for a test")
    return cache // (WIDTH * dtype.itemsize) + 3


def few(rows: int) -> Iterator[slice]:
    step = rows // 7
    return (slice(begin, begin + step) for begin in range(0, rows, step))


def gradients(function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> list[Tensor]:
    """The results, and the gradients of all inputs for results' gradients that are the results themselves."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = function(*leaves)
    return [*(x.detach() for x in results), *torch.autograd.grad(list(results), leaves, [x.detach() for x in results])]


def check(function: Callable[..., Sequence[Tensor]], *inputs: Tensor, rows: int) -> None:
    """Of each of the first results: rows of the large call are those of calls with few rows."""
    found = gradients(function, *inputs)
    for part in few(rows):
        for x, expected in zip(found, gradients(function, *(x[part] for x in inputs)), strict=True):
            assert torch.equal(x[part], expected)


def values(dtype: torch.dtype, seed: int = 0) -> Tensor:
    return random(1, WIDTH, dtype=dtype, seed=seed) * (torch.arange(large(dtype)) % 97 + 1)[:, None].to(dtype)


def test_the_size_of_the_last_cache_is_the_systems() -> None:
    assert extension.module().last_level_cache() == last_level_cache()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(dtype: torch.dtype) -> None:
    gate, up = values(dtype), values(dtype, 1)
    check(lambda gate, up: (swiglu(gate, up),), gate / 32, up / 32, rows=len(gate))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype: torch.dtype) -> None:
    x, residual, weight = values(dtype), values(dtype, 1) / 2, random(WIDTH, dtype=dtype, seed=2)
    check(lambda x: (rms_norm(x, weight, 1e-6),), x, rows=len(x))
    check(lambda x, residual: add_rms_norm(x, residual, weight, 1e-6), x, residual, rows=len(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_norms_weight(dtype: torch.dtype) -> None:
    x, weight = values(dtype), random(WIDTH, dtype=dtype, seed=2) / 64  # the sum of all rows is to fit into fp16
    _, dweight = gradients(lambda weight: (rms_norm(x, weight, 1e-6),), weight)
    normal = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    expected = (normal * rms_norm(x, weight, 1e-6).double()).sum(0)
    assert (dweight.double() - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope(dtype: torch.dtype) -> None:
    x = values(dtype).view(1, -1, HEADS, HEAD_DIM)
    angles = random(x.shape[1], HEAD_DIM // 2)
    cos, sin = angles.cos(), angles.sin()
    found = gradients(lambda x: (rope(x, cos, sin),), x)
    for part in few(x.shape[1]):
        expected = gradients(lambda x, part=part: (rope(x, cos[part], sin[part]),), x[:, part])
        assert torch.equal(found[0][:, part], expected[0])
        assert torch.equal(found[1][:, part], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_of_a_fused_projection_and_its_caches(dtype: torch.dtype) -> None:
    kv_heads = HEADS // 4
    fused = torch.cat([values(dtype), values(dtype, 1)[:, : WIDTH // 2]], -1).view(1, -1, HEADS + 2 * kv_heads, HEAD_DIM)
    q, k, v = fused.split([HEADS, kv_heads, kv_heads], 2)
    tokens = q.shape[1]
    angles = random(tokens, HEAD_DIM // 2)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[None]
    slots[slots % 11 == 3] = -1
    k_cache, v_cache = (torch.zeros(1, tokens, kv_heads, HEAD_DIM, dtype=dtype) for _ in range(2))
    turned_q, turned_k = rope_qk_store(q, k, v, cos, sin, slots, k_cache, v_cache)
    for part in few(tokens):
        expected = rope_qk(q[:, part], k[:, part], cos[part], sin[part])
        assert torch.equal(turned_q[:, part], expected[0])
        assert torch.equal(turned_k[:, part], expected[1])
    stored = slots[0] >= 0
    for cache, source in ((k_cache, turned_k), (v_cache, v)):
        expected_cache = torch.zeros_like(cache)
        expected_cache[0, slots[0, stored]] = source[0, stored]
        assert torch.equal(cache, expected_cache)
