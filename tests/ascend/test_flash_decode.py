"""Attention of one token over a cache on an NPU equals plain torch in float64, in any order of the pipes, without a fault."""

from __future__ import annotations

import ctypes

import pytest
import torch
from npu_flash import Cut, decode_tiling, flash_decode
from npu_kernels import kernel_library
from test_flash import HALVES, SEEDS, TOLERANCE, assert_near, expect, inputs, random
from torch import Tensor


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return kernel_library()


def check(
    library: ctypes.CDLL,
    batch: int,
    kv_len: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    split: int = 128,
    cut: Cut | None = None,
    seed: int = 7,
    prefix: str = "",
) -> tuple[Tensor, Tensor]:
    qkv = inputs(batch, 1, kv_len, heads, head_dim, dtype)
    cut = cut or Cut(q_tile=16 * -(-heads[0] // heads[1] // 16))
    found = flash_decode(library, *qkv, cut=cut, split=split, seed=seed, prefix=prefix)
    expect(found, qkv, False, 0)
    return found


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 1), (14, 2), (40, 2)], ids=str)
def test_heads_and_their_width(library: ctypes.CDLL, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    check(library, 2, 300, heads, head_dim, dtype, seed=SEEDS[head_dim % 7])


@pytest.mark.parametrize("kv_len", [0, 1, 2, 15, 17, 63, 64, 65, 127, 128, 129, 255, 257, 700])
def test_caches_of_any_length(library: ctypes.CDLL, kv_len: int) -> None:
    for split in (64, 128, 1024):
        check(library, 3, kv_len, (6, 2), 64, torch.float16, split=split)


def test_each_sequence_has_a_length_of_its_own(library: ctypes.CDLL) -> None:
    lengths = torch.tensor([0, 1, 127, 128, 129, 300])
    q, k, v = inputs(6, 1, 300, (4, 2), 64, torch.bfloat16)
    for i, n in enumerate(lengths.tolist()):  # past its length a cache holds anything
        k[i, n:], v[i, n:] = float("nan"), float("inf")
    out, lse = flash_decode(library, q, k, v, lengths, seed=7)
    for i, n in enumerate(lengths.tolist()):
        part = [q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n]]
        expect((out[i : i + 1], lse[i : i + 1]), part, False, 0)


def test_a_cache_is_read_where_it_lies(library: ctypes.CDLL) -> None:
    q = random(2, 1, 12 * 64, dtype=torch.float16).view(2, 1, 12, 64)[:, :, :8]
    k, v = (random(2, 2, 400, 64, dtype=torch.float16, seed=i).transpose(1, 2)[:, :333] for i in (3, 4))
    expect(flash_decode(library, q, k, v, seed=7), [q, k, v], False, 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_order_of_the_pipes(library: ctypes.CDLL, seed: int) -> None:
    found = check(library, 2, 500, (8, 2), 64, torch.float16, cut=Cut(3, q_tile=16), seed=seed)
    again = check(library, 2, 500, (8, 2), 64, torch.float16, cut=Cut(2, q_tile=16), seed=0)
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])


def test_the_cut_of_the_tiling(library: ctypes.CDLL) -> None:
    cut, _, (split, splits), _ = decode_tiling(library, 1, 2000, 8, 1, 128, 2)
    assert (split, splits, cut) == (1024, 2, Cut(2, 16, 128, 512, 4096))
    check(library, 1, 2000, (8, 1), 128, torch.bfloat16, split=split, cut=cut)


def test_infinities_and_nan_stay_in_their_heads(library: ctypes.CDLL) -> None:
    q, k, v = inputs(1, 1, 300, (6, 2), 64, torch.float16)
    q[0, 0, 1, 3], q[0, 0, 4, 5] = float("inf"), float("nan")
    found = flash_decode(library, q, k, v, seed=7)
    expect(found, [q, k, v], False, 0)
    assert_near(found[0][:, :, [0, 2, 3, 5]], found[0][:, :, [0, 2, 3, 5]].double(), TOLERANCE[torch.float16])
    assert torch.isnan(found[0][:, :, [1, 4]]).all() and torch.isinf(found[1][0, 1])


SHAPES = [(1, 100, 32, 32, 128), (1, 32768, 64, 8, 128), (16, 4096, 32, 32, 128), (64, 8192, 64, 8, 64), (3, 700, 128, 1, 128)]


@pytest.mark.parametrize("cores", [20, 24])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tiling_fits_and_gives_all_cores_as_much(library: ctypes.CDLL, shape: tuple[int, ...], cores: int) -> None:
    batch, kv_len, heads, kv_heads, head_dim = shape
    cut, workspace, (split, splits), (merge, *memories) = decode_tiling(library, *shape, cores)
    limits = (184 * 1024, 512 * 1024 - 256, 64 * 1024, 64 * 1024, 128 * 1024)
    assert all(0 < used <= limit for used, limit in zip(memories, limits, strict=True)) and merge <= 184 * 1024
    assert (splits - 1) * split < kv_len <= splits * split and heads // kv_heads <= cut.q_tile
    assert workspace == cut.workspace(head_dim) and cut.cores == min(cores, batch * kv_heads * splits)
    if kv_len >= 4096:
        most = -(-batch * kv_heads * splits // cores) * split
        assert most <= 1.25 * batch * kv_heads * kv_len / cores


def test_the_tiling_refuses_what_the_kernel_can_not_do(library: ctypes.CDLL) -> None:
    for shape in [(1, 8, 129, 1, 64), (1, 8, 3, 2, 64), (1, 8, 1, 1, 72), (0, 8, 1, 1, 64)]:
        assert decode_tiling(library, *shape, 24)[0].cores == 0
