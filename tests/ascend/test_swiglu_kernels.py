"""swiglu and its gradient for NPUs equal plain torch in float64, in any order of the pipes, and no fault is found in them."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from npu_kernels import kernel_library, swiglu, tiling
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
from ops_cases import DTYPES, TOLERANCE, assert_near, random

SEEDS = [0, 1, 2, 3, 4, 5, 6, 7, 19]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return kernel_library()


def oracle(fused: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dgate and dup in float64."""
    gate, up = (x.double().requires_grad_() for x in fused.chunk(2, -1))
    y = torch.nn.functional.silu(gate) * up
    return y.detach(), *torch.autograd.grad(y, (gate, up), dy.double())


def check_swiglu(
    library: ctypes.CDLL,
    rows: int,
    width: int,
    dtype: torch.dtype,
    seed: int,
    cores: int = 8,
    prefix: str = "",
    tile: tuple[int, int] | None = None,
) -> None:
    fused, dy = random(rows, 2 * width, dtype=dtype) * 3, random(rows, width, dtype=dtype, seed=1)
    y, dgate, dup = oracle(fused, dy)
    assert_near(swiglu(library, fused, None, seed, cores, prefix, tile)[0], y, TOLERANCE[dtype], "y")
    found = swiglu(library, fused, dy, seed, cores, prefix, tile)
    assert_near(found[0], dgate, TOLERANCE[dtype], "dgate")
    assert_near(found[1], dup, TOLERANCE[dtype], "dup")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 15, 16, 17, 63, 64, 65, 129, 511, 513, 2752, 5504, 8191, 11008])
def test_every_kind_of_width(library: ctypes.CDLL, width: int, dtype: torch.dtype) -> None:
    check_swiglu(library, 5, width, dtype, SEEDS[width % len(SEEDS)])


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 127, 129, 513])
def test_every_kind_of_row_count(library: ctypes.CDLL, rows: int) -> None:
    for dtype in DTYPES:
        check_swiglu(library, rows, 72, dtype, 7)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_order_of_the_pipes(library: ctypes.CDLL, seed: int) -> None:
    for dtype in (torch.float16, torch.float32):
        check_swiglu(library, 37, 300, dtype, seed, cores=2)
        check_swiglu(library, 9, 700, dtype, seed, cores=2, tile=(2, 256))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_far_from_zero_and_nan(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e4, -200.0, -90.0, -20.0, 20.0, 90.0, 200.0, 1e4, float("inf"), float("nan")]).repeat(4, 1)
    fused = torch.cat([gate, torch.full_like(gate, 1.5)], 1).to(dtype)
    found, expected = swiglu(library, fused)[0], oracle(fused, torch.ones(4, 10))[0]
    assert_near(found, expected, TOLERANCE[dtype])
    dgate, dup = swiglu(library, fused[:, [*range(8), *range(10, 18)]].contiguous(), torch.ones(4, 8, dtype=dtype))
    _, expected_dgate, expected_dup = oracle(fused[:, [*range(8), *range(10, 18)]], torch.ones(4, 8))
    assert_near(dgate, expected_dgate, TOLERANCE[dtype])
    assert_near(dup, expected_dup, TOLERANCE[dtype])


def test_the_tiling_fits_and_gives_every_core_work(library: ctypes.CDLL) -> None:
    for cores in (8, 40, 48):
        for rows in (1, 3, 47, 48, 500, 8192):
            for width in (1, 100, 2752, 5504, 11008, 13824, 65537):
                for size in (2, 4):
                    for backward in (0, 1):
                        used, tile_rows, columns, taken = tiling(library, "swiglu", rows, width, size, backward, cores)
                        units = -(-rows // tile_rows) * -(-width // columns)
                        assert 1 <= used <= cores and used == min(cores, units) and taken <= 184 * 1024
                        assert columns == width or columns % 64 == 0
                        assert units >= min(cores, rows * -(-width // 256)) * 0.5
    assert tiling(library, "swiglu", 0, 64, 2, 0, 48)[0] == 0
