"""Attention on an NPU equals plain torch in float64, in any order of the pipes, and no fault is found in it."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from npu_flash import PAIRS, SMALL, Cut, flash_forward, forward_tiling
from npu_kernels import kernel_library
from torch import Tensor

from pyalpaca.ops import reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
from ops_cases import TOLERANCE, assert_near, random

HALVES = [torch.float16, torch.bfloat16]
SEEDS = [0, 1, 2, 3, 4, 5, 6, 7, 19, 20, 21, 22, 23, 24, 25]
# Around a row, fractals of 16, groups of 64, a tile and a stack of SMALL and twice these.
LENGTHS = [1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return kernel_library()


def inputs(batch: int, q_len: int, kv_len: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(q_len, heads[0]), (kv_len, heads[1]), (kv_len, heads[1])]
    return [random(batch, length, n, head_dim, dtype=dtype, seed=i) for i, (length, n) in enumerate(shapes)]


def expect(found: tuple[Tensor, Tensor], qkv: list[Tensor], causal: bool, q_offset: int) -> None:
    q, k, v = qkv
    out, lse = reference.flash_attention(q.double(), k.double(), v.double(), causal, q_offset, q.shape[-1] ** -0.5)
    assert_near(found[0], out, TOLERANCE[q.dtype], "out")
    assert_near(found[1], lse, TOLERANCE[torch.float32], "lse")


def check(
    library: ctypes.CDLL,
    lengths: tuple[int, int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    causal: bool,
    q_offset: int = 0,
    batch: int = 1,
    cut: Cut = SMALL,
    seed: int = 7,
) -> tuple[Tensor, Tensor]:
    qkv = inputs(batch, *lengths, heads, head_dim, dtype)
    found = flash_forward(library, *qkv, causal, q_offset, cut=cut, seed=seed)
    expect(found, qkv, causal, q_offset)
    return found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 1)], ids=str)
def test_heads_and_their_width(
    library: ctypes.CDLL, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, causal: bool
) -> None:
    check(library, (45, 150), heads, head_dim, dtype, causal, 105, batch=2, seed=SEEDS[head_dim % 7])


@pytest.mark.parametrize("q_len", LENGTHS)
def test_sequences_of_any_length(library: ctypes.CDLL, q_len: int) -> None:
    for i, kv_len in enumerate(LENGTHS):
        for cut in (SMALL, PAIRS):
            check(library, (q_len, kv_len), (2, 1), 16, HALVES[i % 2], i % 3 > 0, kv_len - q_len, cut=cut, seed=SEEDS[i])


@pytest.mark.parametrize("cut", [SMALL, PAIRS], ids=["alone", "pairs"])
@pytest.mark.parametrize("q_offset", [-200, -65, -64, -3, -1, 0, 1, 5, 31, 32, 33, 64, 100, 300])
def test_any_offset_of_the_queries_and_rows_that_see_nothing(library: ctypes.CDLL, q_offset: int, cut: Cut) -> None:
    out, lse = check(library, (70, 150), (2, 1), 64, torch.float16, True, q_offset, cut=cut)
    hidden = min(max(-q_offset, 0), 70)
    assert not out[:, :hidden].any() and torch.equal(lse[:, :, :hidden], torch.full((1, 2, hidden), -torch.inf))


def test_no_keys_at_all(library: ctypes.CDLL) -> None:
    out, lse = check(library, (33, 0), (2, 1), 64, torch.bfloat16, False)
    assert not out.any() and torch.isneginf(lse).all()


@pytest.mark.parametrize("groups", range(1, 17))
def test_stacks_of_any_number_of_groups(library: ctypes.CDLL, groups: int) -> None:
    cut = Cut(stack=64 * groups, chunk=1024 if groups < 3 else 8192, share=1 + groups % 2)
    check(library, (45, 64 * groups + 30), (1, 1), 16, HALVES[groups % 2], False, cut=cut, seed=SEEDS[groups % 15])


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_order_of_the_pipes(library: ctypes.CDLL, seed: int, share: int) -> None:
    found = check(library, (70, 200), (3, 1), 64, torch.float16, True, 100, cut=Cut(3, share=share), seed=seed)
    again = check(library, (70, 200), (3, 1), 64, torch.float16, True, 100, cut=Cut(2), seed=0)
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_of_full_size(library: ctypes.CDLL, head_dim: int) -> None:
    cut, _, _ = forward_tiling(library, 1, 1100, 1100, 2, 1, head_dim, 2)
    assert cut == Cut(2, 128, 128, 512, 8192, 1)
    check(library, (200, 1100), (2, 1), head_dim, torch.bfloat16, True, 900, cut=cut)
    check(library, (130, 577), (1, 1), head_dim, torch.float16, False, cut=cut, seed=1)
    check(library, (300, 700), (1, 1), head_dim, torch.float16, True, 390, cut=replace(cut, share=2), seed=5)


def test_packed_sequences(library: ctypes.CDLL) -> None:
    q_lengths, kv_lengths = [5, 64, 1, 33, 0, 40], [5, 64, 1, 97, 3, 7]
    starts = [torch.tensor([0, *lengths]).cumsum(0).tolist() for lengths in (q_lengths, kv_lengths)]
    q, k, v = (x[0] for x in inputs(1, starts[0][-1], starts[1][-1], (4, 2), 64, torch.float16))
    for causal, share in product((False, True), (1, 2)):
        out, lse = flash_forward(library, q, k, v, causal, starts=(starts[0], starts[1]), cut=Cut(3, share=share), seed=7)
        for (begin, end), (kv_begin, kv_end) in zip(pairwise(starts[0]), pairwise(starts[1]), strict=True):
            part = [q[None, begin:end], k[None, kv_begin:kv_end], v[None, kv_begin:kv_end]]
            if end > begin:  # the last query sees the last key
                expect((out[None, begin:end], lse[None, :, begin:end]), part, causal, kv_end - kv_begin - end + begin)


def test_a_fused_projection_and_a_cache_are_read_where_they_lie(library: ctypes.CDLL) -> None:
    fused = random(2, 50, 8 * 64, dtype=torch.float16).view(2, 50, 8, 64)
    q, k, v = fused.split([4, 2, 2], dim=2)
    expect(flash_forward(library, q, k, v, True, seed=7), [q, k, v], True, 0)
    k_cache, v_cache = (random(2, 2, 130, 64, dtype=torch.float16, seed=i).transpose(1, 2) for i in (3, 4))
    k, v = k_cache[:, :90], v_cache[:, :90]
    expect(flash_forward(library, q, k, v, True, 40, seed=7), [q, k, v], True, 40)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_infinities_and_nan_stay_in_their_rows(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    q, k, v = inputs(1, 70, 150, (2, 1), 64, dtype)
    k[0, 100, 0, :] = 4  # what the rows below meet there has the sign of their elements
    q[0, 3, 0, 5], q[0, 40, 1, 7], q[0, 50, 0, 9] = float("inf"), float("-inf"), float("nan")
    v[0, 2, 0, 3], v[0, 5, 0, 4] = float("nan"), float("inf")
    found = flash_forward(library, q, k, v, True, 80, seed=7)
    expect(found, [q, k, v], True, 80)
    assert torch.isnan(found[0]).sum() > 3 * 64


def test_scores_that_leave_no_room_for_others(library: ctypes.CDLL) -> None:
    q, k, v = inputs(1, 33, 130, (1, 1), 64, torch.float16)
    expect(flash_forward(library, 100 * q, 100 * k, v, False, seed=7), [100 * q, 100 * k, v], False, 0)


SHAPES = [
    (1, 1, 1, 1, 1, 64),
    (2, 1, 4096, 32, 32, 128),
    (1, 100, 100, 4, 4, 64),
    (3, 129, 513, 8, 2, 80),
    (1, 4096, 4096, 32, 32, 128),
    (1, 32768, 32768, 64, 8, 128),
    (8, 2048, 2048, 32, 32, 64),
    (1, 5, 0, 2, 1, 16),
]


@pytest.mark.parametrize("cores", [20, 24])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tiling_fits_every_memory(library: ctypes.CDLL, shape: tuple[int, ...], cores: int) -> None:
    cut, workspace, memories = forward_tiling(library, *shape, cores)
    batch, q_len, _, heads, _, head_dim = shape
    limits = (184 * 1024, 512 * 1024 - 256, 64 * 1024, 64 * 1024, 128 * 1024)
    assert all(0 < used <= limit for used, limit in zip(memories, limits, strict=True))
    assert cut.q_tile % 16 == cut.kv_tile % 16 == cut.stack % 64 == 0 and cut.chunk >= 8 * cut.stack
    tiles = batch * heads * -(-q_len // (cut.q_tile * cut.share))
    assert cut.cores == min(cores, tiles) and workspace == cut.workspace(head_dim)


def test_the_tiling_takes_smaller_tiles_where_cores_would_stand_idle(library: ctypes.CDLL) -> None:
    assert forward_tiling(library, 1, 256, 256, 8, 8, 128, 24)[0].q_tile == 64
    assert forward_tiling(library, 1, 4096, 4096, 32, 32, 128, 24)[0].q_tile == 128


def test_the_tiling_lets_tiles_share_keys_where_all_cores_have_some_groups_of_them(library: ctypes.CDLL) -> None:
    assert forward_tiling(library, 1, 4096, 4096, 32, 32, 128, 24)[0].share == 2
    assert forward_tiling(library, 1, 1024, 1024, 32, 32, 128, 24)[0].share == 1


def test_the_tiling_refuses_what_the_kernel_can_not_do(library: ctypes.CDLL) -> None:
    for shape in [(1, 8, 8, 1, 1, 136), (1, 8, 8, 1, 1, 72), (1, 8, 8, 3, 2, 64), (0, 8, 8, 1, 1, 64), (1, 0, 8, 1, 1, 64)]:
        assert forward_tiling(library, *shape, 24)[0].cores == 0


@pytest.mark.parametrize(("heads", "q_len"), [(32, 4096), (32, 2048), (40, 1000), (8, 8192)])
def test_causal_work_is_dealt_evenly(library: ctypes.CDLL, heads: int, q_len: int) -> None:
    cores, share = 24, forward_tiling(library, 1, q_len, q_len, heads, heads, 128, 24)[0].share
    work = (ctypes.c_int64 * cores)()
    library.work_of_cores(*map(ctypes.c_int64, (1, q_len, q_len, heads, 128, share, cores)), work)
    exact = heads * sum(128 * min(row + 128, q_len) for row in range(0, q_len, 128))
    assert sum(work) == pytest.approx(exact, rel=0.05)
    assert max(work) <= 1.07 * sum(work) / cores
