"""The Ascend kernels equal plain torch in float64, in any order of the pipes, and no fault is found in them."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from npu_kernels import kernel_library, rms_norm, rms_norm_backward, rope, tiling
from torch import Tensor

from pyalpaca.ops import reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
from ops_cases import DTYPES, TOLERANCE, assert_near, random

EPS = 1e-5
# Around blocks of 8 and 16, repeats of 64, the longest narrow row (2040), chunks of 2048, and the widths of models.
WIDTHS = [2, 7, 15, 16, 17, 63, 64, 65, 127, 129, 256, 511, 513, 1000, 2039, 2040, 2041, 2047, 2049, 4096, 5120, 8191, 8192]
SEEDS = [0, 1, 2, 3, 4, 5, 6, 7, 19]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return kernel_library()


def norm_oracle(x: Tensor, gamma: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    h = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    wide = h.double()
    return reference.rms_norm(wide, gamma.double(), EPS), h, torch.rsqrt(wide.pow(2).mean(-1) + EPS)


def gradient_oracle(dy: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    leaves = [x.double().requires_grad_(), gamma.double().requires_grad_()]
    dx, dgamma = torch.autograd.grad(reference.rms_norm(leaves[0], leaves[1], EPS), leaves, dy.double())
    return dx, dgamma


def check_norm(library: ctypes.CDLL, rows: int, width: int, dtype: torch.dtype, residual: bool, seed: int) -> None:
    x, gamma = random(rows, width, dtype=dtype), random(width)
    other = random(rows, width, dtype=dtype, seed=3) if residual else None
    y, h, rstd = rms_norm(library, x, gamma, EPS, other, seed)
    expected_y, expected_h, expected_rstd = norm_oracle(x, gamma, other)
    assert_near(y, expected_y, TOLERANCE[dtype], "y")
    assert torch.equal(h, expected_h)
    assert_near(rstd, expected_rstd, TOLERANCE[torch.float32], "rstd")


def check_gradient(library: ctypes.CDLL, rows: int, width: int, dtype: torch.dtype, residual: bool, seed: int) -> None:
    x, dy, gamma = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype, seed=5), random(width)
    dsum = random(rows, width, dtype=dtype, seed=6) if residual else None
    rstd = norm_oracle(x, gamma)[2].float()
    dx, dgamma = rms_norm_backward(library, dy, x, gamma, rstd, dsum, seed)
    expected_dx, expected_dgamma = gradient_oracle(dy, x, gamma)
    assert_near(dx, expected_dx + (0 if dsum is None else dsum.double()), TOLERANCE[dtype], "dx")
    assert_near(dgamma, expected_dgamma, TOLERANCE[dtype], "dgamma")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_of_every_kind_of_width(library: ctypes.CDLL, width: int, dtype: torch.dtype) -> None:
    seed = SEEDS[width % len(SEEDS)]
    for residual in (False, True):
        check_norm(library, 19, width, dtype, residual, seed)
        check_gradient(library, 19, width, dtype, residual, seed)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 63, 65, 127, 129, 513])
def test_rms_norm_of_every_kind_of_row_count(library: ctypes.CDLL, rows: int) -> None:
    for dtype in DTYPES:
        check_norm(library, rows, 72, dtype, True, 7)
        check_gradient(library, rows, 72, dtype, True, 7)


@pytest.mark.parametrize("seed", SEEDS)
def test_rms_norm_in_every_order_of_the_pipes(library: ctypes.CDLL, seed: int) -> None:
    for width in (300, 4096):
        for dtype in (torch.float16, torch.float32):
            check_norm(library, 37, width, dtype, True, seed)
            check_gradient(library, 37, width, dtype, True, seed)


def test_the_gradient_of_gamma_is_the_same_in_every_order(library: ctypes.CDLL) -> None:
    x, dy, gamma = random(200, 520), random(200, 520, seed=1), random(520)
    rstd = norm_oracle(x, gamma)[2].float()
    first = rms_norm_backward(library, dy, x, gamma, rstd, seed=0)
    for seed in SEEDS[1:]:
        again = rms_norm_backward(library, dy, x, gamma, rstd, seed=seed)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [100, 3000])
def test_infinities_and_nan_stay_in_their_row(library: ctypes.CDLL, width: int, dtype: torch.dtype) -> None:
    x, gamma = random(12, width, dtype=dtype), random(width)
    x[2, 5], x[7, width - 1] = float("inf"), float("nan")
    y, _, _ = rms_norm(library, x, gamma, EPS)
    assert_near(y, norm_oracle(x, gamma)[0], TOLERANCE[dtype])


def test_large_values_do_not_overflow(library: ctypes.CDLL) -> None:
    x, gamma = torch.full((3, 512), 6e4, dtype=torch.float16), torch.ones(512)
    assert_near(rms_norm(library, x, gamma, EPS)[0], norm_oracle(x, gamma)[0], TOLERANCE[torch.float16])


def angles(positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angle = torch.outer(
        torch.arange(positions, dtype=torch.float64), 10000 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    )
    return angle.cos().float(), angle.sin().float()


def check_rope(
    library: ctypes.CDLL,
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    seed: int,
    positions: bool,
    inverse: bool,
) -> None:
    cos, sin = angles(50, head_dim)
    q_width, k_width = heads[0] * head_dim, heads[1] * head_dim
    qkv = random(tokens, q_width + 2 * k_width + 16, dtype=dtype)  # longer than what is looked at
    at = torch.randint(50, (tokens,), generator=torch.Generator().manual_seed(1)) if positions else torch.arange(tokens) % 50
    slots = torch.randperm(tokens + 3, generator=torch.Generator().manual_seed(2))[:tokens]
    slots[tokens // 2] = -1
    caches = [random(tokens + 3, heads[1], head_dim, dtype=dtype, seed=i) for i in (8, 9)]
    found = rope(library, qkv, heads, cos, sin, at if positions else None, (slots, *caches), inverse, seed)
    c, s = cos[at].double(), sin[at].double() * (-1 if inverse else 1)
    q, k = qkv[:, :q_width].view(tokens, heads[0], head_dim), qkv[:, q_width : q_width + k_width].view(tokens, heads[1], head_dim)
    expected = [reference.rope(x.double()[None], c[None], s[None])[0] for x in (q, k)]
    for x, wanted, name in zip(found, expected, ("q", "k"), strict=False):
        assert_near(x, wanted, TOLERANCE[dtype], name)
    kept = slots >= 0
    v = qkv[:, q_width + k_width : q_width + 2 * k_width].view(tokens, heads[1], head_dim)
    for cache, before, stored in zip(found[2:], caches, (found[1], v), strict=True):
        wanted = before.clone()
        wanted[slots[kept]] = stored[kept]
        assert torch.equal(cache, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (32, 32), (64, 8), (128, 8)], ids=str)
def test_rope_of_every_kind_of_head_count(
    library: ctypes.CDLL, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    for kind, (positions, inverse) in enumerate([(False, False), (False, True), (True, False), (True, True)]):
        seed = SEEDS[(heads[0] + kind) % len(SEEDS)]
        check_rope(library, 7, heads, head_dim, dtype, seed, positions, inverse)


@pytest.mark.parametrize("tokens", [1, 2, 8, 15, 49, 50, 51, 129])
def test_rope_of_every_kind_of_token_count(library: ctypes.CDLL, tokens: int) -> None:
    for dtype in DTYPES:
        check_rope(library, tokens, (4, 2), 64, dtype, 7, False, False)
        check_rope(library, tokens, (4, 2), 128, dtype, 8, True, True)


@pytest.mark.parametrize("seed", SEEDS)
def test_rope_in_every_order_of_the_pipes(library: ctypes.CDLL, seed: int) -> None:
    check_rope(library, 61, (12, 4), 128, torch.bfloat16, seed, True, False)
    check_rope(library, 61, (128, 128), 128, torch.float32, seed, False, True)


def test_rope_without_a_cache_and_infinities(library: ctypes.CDLL) -> None:
    cos, sin = angles(9, 64)
    qkv = random(9, 6 * 64, dtype=torch.float16)
    qkv[3, 10], qkv[4, 300] = float("inf"), float("nan")
    alone = rope(library, qkv, (4, 0), cos, sin)
    assert alone[1].shape == (9, 0, 64)
    assert torch.equal(alone[0].nan_to_num(7), rope(library, qkv, (4, 1), cos, sin)[0].nan_to_num(7))
    q, k = rope(library, qkv, (4, 1), cos, sin)
    for x, part in ((q, qkv[:, :256]), (k, qkv[:, 256:320])):
        wanted = reference.rope(part.reshape(1, 9, -1, 64).double(), cos.double(), sin.double())[0]
        assert_near(x, wanted, TOLERANCE[torch.float16])


@pytest.mark.parametrize("size", [2, 4])
def test_the_tiling_fits_and_takes_the_cores_there_are(library: ctypes.CDLL, size: int) -> None:
    for width in range(1, 8193, 37):
        for rows, cores in ((1, 48), (47, 48), (48, 48), (5000, 40)):
            for residual in (0, 1):
                used, tile_rows, bytes_used, _ = tiling(library, "rms_norm", rows, width, size, residual, cores)
                assert used == min(rows, cores) and 1 <= tile_rows <= 128 and bytes_used <= 184 * 1024
            used, tile_rows, buffers, bytes_used = tiling(library, "rms_norm_backward", rows, width, size, 0, cores)
            assert used == min(rows, cores) and 1 <= tile_rows <= 128 and buffers in (1, 2) and bytes_used <= 184 * 1024
            second, columns, _, _ = tiling(library, "dgamma", used, width, 0, 0, cores)
            assert columns % 64 == 0 and (second - 1) * columns < width <= second * columns
            assert used * columns * 4 + columns * 4 + 64 <= 184 * 1024
    for heads in ((1, 1), (32, 32), (64, 8), (128, 128), (512, 16)):
        for head_dim in (64, 128):
            for cache in (0, 1):
                used, tokens, tile_heads, bytes_used = tiling(library, "rope", 1000, *heads, head_dim, size, cache, 48)
                assert 1 <= used <= 48 and 1 <= tokens <= 64 and 1 <= tile_heads <= 128 and bytes_used <= 184 * 1024


def test_the_tiling_refuses_what_the_kernels_can_not_do(library: ctypes.CDLL) -> None:
    assert tiling(library, "rms_norm", 10, 8193, 2, 0, 48)[0] == 0
    assert tiling(library, "rms_norm_backward", 10, 8193, 2, 0, 48)[0] == 0
    assert tiling(library, "rms_norm", 0, 64, 2, 0, 48)[0] == 0
    for head_dim in (8, 72, 144):
        assert tiling(library, "rope", 10, 4, 4, head_dim, 2, 0, 48)[0] == 0
