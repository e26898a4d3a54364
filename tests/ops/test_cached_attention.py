"""Attention over a cache of any kept dtype equals plain torch in float64 over what the cache holds; storing rounds as it says."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from ops_cases import DTYPES, TOLERANCE, assert_near, backends_here, random
from torch import Tensor

from pyalpaca.ops import backend, cached_attention, flash_attention, reference, store_cache

BACKENDS = backends_here()
CACHE_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


@dataclass(frozen=True)
class Case:
    batch: int = 1
    queries: int = 1
    length: int = 20
    room: int = 24
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    head_first: bool = True  # a head's positions one after the other

    def cache(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """A cache and its scales, both full of NaN or, in int8, of scales that are."""
        shape = (self.batch, self.kv_heads, self.room, self.head_dim)
        cache = torch.full(shape, 99 if dtype == torch.int8 else torch.nan, dtype=dtype)
        scales = torch.full(shape[:3], torch.nan) if dtype == torch.int8 else None
        if self.head_first:
            return cache.transpose(1, 2), None if scales is None else scales.transpose(1, 2)
        return cache.transpose(1, 2).contiguous(), None if scales is None else scales.transpose(1, 2).contiguous()

    def x(self, dtype: torch.dtype, seed: int) -> Tensor:
        return random(self.batch, self.length, self.kv_heads, self.head_dim, dtype=dtype, seed=seed)


CASES = [
    Case(),
    Case(batch=3, heads=4, kv_heads=2, length=1, room=1),
    Case(head_dim=8, length=63, room=70, heads=6, kv_heads=2),
    Case(head_dim=128, length=64, room=64, heads=7, kv_heads=1),
    Case(head_dim=72, length=129, room=200, heads=3, kv_heads=1, head_first=False),
    Case(head_dim=256, length=65, room=66),
    Case(batch=2, head_dim=64, length=131, room=131, heads=16, kv_heads=2),
    Case(head_dim=24, length=259, room=260, heads=11, kv_heads=1, head_first=False),
    Case(head_dim=136, length=90, room=99, heads=15, kv_heads=3),
    Case(head_dim=64, length=5000, room=5001, heads=2, kv_heads=1),
    Case(queries=5, length=9, heads=4),
    Case(queries=70, length=200, room=200, heads=4, kv_heads=2, head_dim=40),
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle_over_what_the_cache_holds(name: str, cache_dtype: torch.dtype, case: Case) -> None:
    for dtype in DTYPES:
        (k, k_scales), (v, v_scales) = case.cache(cache_dtype), case.cache(cache_dtype)
        q = random(case.batch, case.queries, case.heads, case.head_dim, dtype=dtype)
        with backend(name):
            for start, stop in ((0, case.length - 1), (case.length - 1, case.length)):
                store_cache(case.x(dtype, 1)[:, start:stop], k, start, scales_BTK=k_scales)
                store_cache(case.x(dtype, 2)[:, start:stop], v, start, scales_BTK=v_scales)
            out = cached_attention(q, k, v, case.length, k_scales_BTK=k_scales, v_scales_BTK=v_scales)
        held = [reference.cached(*pair, case.length).double() for pair in ((k, k_scales), (v, v_scales))]
        offset = case.length - case.queries
        expected, _ = reference.flash_attention(q.double(), *held, True, offset, case.head_dim**-0.5)
        assert out.dtype == dtype
        assert_near(out, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
def test_every_backend_stores_the_same(name: str, cache_dtype: torch.dtype) -> None:
    case = Case(length=24, head_dim=40)
    for dtype in DTYPES:
        x = case.x(dtype, 3)
        x[0, 3], x[0, 4] = 0.0, 1e-30
        x[0, 5, 0, :2] = torch.tensor([100.0, 50.0])
        found, expected = case.cache(cache_dtype), case.cache(cache_dtype)
        with backend(name):
            store_cache(x, found[0], 0, scales_BTK=found[1])
        reference.store_cache(x, *expected, 0)
        assert torch.equal(found[0], expected[0])
        assert found[1] is None or torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", BACKENDS)
def test_int8_is_within_half_a_step(name: str) -> None:
    case = Case(length=24)
    x, (cache, scales) = case.x(torch.float32, 5), case.cache(torch.int8)
    with backend(name):
        store_cache(x, cache, 0, scales_BTK=scales)
    assert scales is not None
    torch.testing.assert_close(scales, x.abs().amax(-1) / 127)
    assert ((reference.cached(cache, scales, 24) - x).abs() <= 0.5001 * scales[..., None]).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_not_hidden(name: str, cache_dtype: torch.dtype, value: float) -> None:
    case = Case()
    (k, k_scales), (v, v_scales) = case.cache(cache_dtype), case.cache(cache_dtype)
    values = case.x(torch.float32, 2)
    values[0, 7, 0, 3] = value
    with backend(name):
        store_cache(case.x(torch.float32, 1), k, 0, scales_BTK=k_scales)
        store_cache(values, v, 0, scales_BTK=v_scales)
        out = cached_attention(random(1, 1, 2, 32), k, v, 20, k_scales_BTK=k_scales, v_scales_BTK=v_scales)
    assert not torch.isfinite(out[0, 0, 0, 3])
    assert torch.isfinite(out[0, 0, 1]).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_one_query_is_the_last_of_many(name: str) -> None:
    q, k, v = (random(2, 300, 4, 64, seed=seed) for seed in range(3))
    with backend(name):
        whole, last = flash_attention(q, k, v), cached_attention(q[:, -1:], k, v, 300)
    assert_near(last, whole[:, -1:].double(), 4e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_same_result_in_every_run(name: str) -> None:
    q, k, v = random(1, 1, 2, 64), random(1, 9000, 1, 64, seed=1), random(1, 9000, 1, 64, seed=2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with backend(name):
            first, second = (cached_attention(q, k, v, 9000) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first, second)
    expected, _ = reference.flash_attention(q.double(), k.double(), v.double(), True, 8999, 64**-0.5)
    assert_near(first, expected, 4e-6)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_wrong_arguments_are_named() -> None:
    q, k, int8 = random(1, 1, 2, 8), random(1, 9, 2, 8), torch.zeros(1, 9, 2, 8, dtype=torch.int8)
    with backend("cpp"):
        with pytest.raises(ValueError, match="the length is 10, expected from 1, the queries, to 9, the cache"):
            cached_attention(q, k, k, 10)
        with pytest.raises(ValueError, match="k is Char and its scales are absent, expected scales for int8 and only for it"):
            cached_attention(q, int8, int8, 9)
        with pytest.raises(ValueError, match="v is Half on cpu, expected that of k: Float on cpu"):
            cached_attention(q, k, k.half(), 9)
        with pytest.raises(ValueError, match=r"for position 9 of a cache of .*, expected as many heads and room for it"):
            store_cache(q, k, 9)
