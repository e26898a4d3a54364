"""The gradient of attention on an NPU equals plain torch in float64, in any order of the pipes, and no fault is found in it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from npu_flash import GradientCut, backward_tiling, flash_backward
from npu_kernels import kernel_library
from test_flash import HALVES, SEEDS, SHAPES, TOLERANCE, assert_near, inputs, random
from torch import Tensor

from pyalpaca.ops import reference

CUT = GradientCut()


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return kernel_library()


def oracle(qkv: list[Tensor], dout: Tensor, causal: bool, q_offset: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out in the type of q, lse in fp32, and the gradients in fp64."""
    leaves = [x.double().requires_grad_() for x in qkv]
    out, lse = reference.flash_attention(*leaves, causal, q_offset, qkv[0].shape[-1] ** -0.5)
    return out.detach().to(dout.dtype), lse.float(), list(torch.autograd.grad(out, leaves, dout.double()))


def expect(found: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    for x, wanted, name in zip(found, expected, ("dq", "dk", "dv"), strict=True):
        assert_near(x, wanted, TOLERANCE[x.dtype], name)


def expect_of_few_keys(found: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    """Where a row sees a key or two, dq and dk are what is left of terms as large as dv, rounded as those are."""
    scale = max(x.abs().max().item() for x in expected)
    for x, wanted in zip(found, expected, strict=True):
        assert (x.double() - wanted).abs().max() <= TOLERANCE[x.dtype] * scale


def check(
    library: ctypes.CDLL,
    lengths: tuple[int, int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    causal: bool,
    q_offset: int = 0,
    batch: int = 1,
    cut: GradientCut = CUT,
    seed: int = 7,
    prefix: str = "",
    expect: Callable[[tuple[Tensor, ...], list[Tensor]], None] = expect,
) -> tuple[Tensor, ...]:
    qkv = inputs(batch, *lengths, heads, head_dim, dtype)
    dout = random(*qkv[0].shape, dtype=dtype, seed=5)
    out, lse, gradients = oracle(qkv, dout, causal, q_offset)
    found = flash_backward(library, dout, *qkv, out, lse, causal, q_offset, cut=cut, seed=seed, prefix=prefix)
    expect(found, gradients)
    return found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128])
def test_heads_and_their_width(library: ctypes.CDLL, head_dim: int, dtype: torch.dtype, causal: bool) -> None:
    for heads in ((1, 1), (4, 2), (3, 1)):
        check(library, (45, 100), heads, head_dim, dtype, causal, 55, seed=SEEDS[head_dim % 7])


@pytest.mark.parametrize("q_len", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 129])
def test_sequences_of_any_length(library: ctypes.CDLL, q_len: int) -> None:
    for i, kv_len in enumerate([1, 2, 15, 17, 32, 33, 63, 65, 129]):
        lengths, causal = (q_len, kv_len), i % 3 > 0
        check(library, lengths, (1, 1), 16, HALVES[i % 2], causal, kv_len - q_len, seed=SEEDS[i], expect=expect_of_few_keys)


@pytest.mark.parametrize("q_offset", [-200, -65, -64, -3, -1, 0, 1, 33, 64, 100, 300])
def test_any_offset_of_the_queries_and_what_sees_nothing(library: ctypes.CDLL, q_offset: int) -> None:
    dq, dk, _ = check(library, (70, 150), (2, 1), 64, torch.float16, True, q_offset)
    assert not dq[:, : max(-q_offset, 0)].any() and not dk[:, max(70 + q_offset, 0) :].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_every_order_of_the_pipes(library: ctypes.CDLL, seed: int) -> None:
    found = check(library, (70, 200), (3, 1), 64, torch.float16, True, 100, cut=GradientCut(3), seed=seed)
    again = check(library, (70, 200), (3, 1), 64, torch.float16, True, 100, cut=GradientCut(2), seed=0)
    assert torch.equal(found[1], again[1]) and torch.equal(found[2], again[2])  # dk and dv, not dq


@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_of_full_size(library: ctypes.CDLL, head_dim: int) -> None:
    cut, _, _ = backward_tiling(library, 1, 600, 600, 2, 2, head_dim, 2)
    assert cut == GradientCut(2, 128, 256, 256, 4096)
    check(library, (300, 330), (1, 1), head_dim, torch.bfloat16, True, 30, cut=cut)


def test_blocks_of_keys_with_a_single_step_each(library: ctypes.CDLL) -> None:
    check(library, (20, 500), (1, 1), 32, torch.float16, True, 480, cut=GradientCut(1), seed=3)
    check(library, (20, 500), (1, 1), 32, torch.float16, False, cut=GradientCut(1), seed=22)


def test_packed_sequences(library: ctypes.CDLL) -> None:
    q_lengths, kv_lengths = [5, 64, 1, 33, 0, 40], [5, 64, 1, 97, 3, 7]
    starts = [torch.tensor([0, *lengths]).cumsum(0).tolist() for lengths in (q_lengths, kv_lengths)]
    qkv = [x[0] for x in inputs(1, starts[0][-1], starts[1][-1], (4, 2), 64, torch.float16)]
    dout = random(*qkv[0].shape, dtype=torch.float16, seed=5)
    for causal in (False, True):
        out, lse = torch.empty_like(dout), torch.empty(4, len(dout))
        expected = [torch.zeros_like(x, dtype=torch.float64) for x in qkv]
        for (begin, end), (kv_begin, kv_end) in zip(pairwise(starts[0]), pairwise(starts[1]), strict=True):
            if end == begin:
                continue
            parts = [slice(begin, end), slice(kv_begin, kv_end), slice(kv_begin, kv_end)]
            part = [x[None, where] for x, where in zip(qkv, parts, strict=True)]
            offset = kv_end - kv_begin - end + begin
            some_out, some_lse, some = oracle(part, dout[None, begin:end], causal, offset)
            out[begin:end], lse[:, begin:end] = some_out[0], some_lse[0]
            for total, gradient, where in zip(expected, some, parts, strict=True):
                total[where] = gradient[0]
        found = flash_backward(library, dout, *qkv, out, lse, causal, starts=(starts[0], starts[1]), cut=GradientCut(3), seed=7)
        expect(found, expected)


def test_tensors_are_read_where_they_lie(library: ctypes.CDLL) -> None:
    q, k, v = random(2, 50, 8 * 64, dtype=torch.float16).view(2, 50, 8, 64).split([4, 2, 2], dim=2)
    dout = random(2, 4, 50, 64, dtype=torch.float16, seed=5).transpose(1, 2)
    out, lse, gradients = oracle([q, k, v], dout, True, 0)
    expect(flash_backward(library, dout, q, k, v, out, lse, True, seed=7), gradients)


def test_nan_stays_in_its_rows_and_reaches_the_keys_they_see(library: ctypes.CDLL) -> None:
    qkv = inputs(1, 70, 150, (2, 1), 64, torch.float16)
    dout = random(*qkv[0].shape, dtype=torch.float16, seed=5)
    dout[0, 40, 1, 7] = float("nan")
    out, lse, gradients = oracle(qkv, dout, False, 0)
    dq, dk, dv = flash_backward(library, dout, *qkv, out, lse, False, seed=7)
    assert_near(dq, gradients[0], TOLERANCE[torch.float16], "dq")
    assert torch.isnan(dq[0, 40, 1]).all() and torch.isnan(dq).sum() == 64
    assert torch.isnan(dk).all() and torch.isnan(dv).sum() == 150


@pytest.mark.parametrize("cores", [20, 24])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] > 0], ids=str)
def test_the_tiling_fits_every_memory(library: ctypes.CDLL, shape: tuple[int, ...], cores: int) -> None:
    cut, workspace, memories = backward_tiling(library, *shape, cores)
    batch, _, kv_len, _, kv_heads, head_dim = shape
    limits = (184 * 1024, 512 * 1024 - 256, 64 * 1024, 64 * 1024, 128 * 1024)
    assert all(0 < used <= limit for used, limit in zip(memories, limits, strict=True))
    assert cut.side % 16 == cut.q_block % 16 == cut.kv_block % 64 == 0 and cut.chunk >= 8 * max(cut.kv_block, head_dim)
    blocks = batch * kv_heads * -(-kv_len // cut.kv_block)
    assert cut.cores == min(cores, blocks) and workspace == cut.workspace(head_dim)


def test_the_tiling_refuses_what_the_kernel_can_not_do(library: ctypes.CDLL) -> None:
    for shape in [(1, 8, 8, 1, 1, 136), (1, 8, 8, 1, 1, 72), (1, 8, 8, 3, 2, 64), (1, 8, 0, 1, 1, 64), (1, 0, 8, 1, 1, 64)]:
        assert backward_tiling(library, *shape, 24)[0].cores == 0


@pytest.mark.parametrize(("heads", "q_len"), [(32, 4096), (32, 2048), (40, 1000), (8, 8192)])
def test_causal_work_is_dealt_evenly(library: ctypes.CDLL, heads: int, q_len: int) -> None:
    cores, block = 24, 256
    work = (ctypes.c_int64 * cores)()
    library.gradient_work_of_cores(*map(ctypes.c_int64, (1, q_len, q_len, heads, block, cores)), work)
    exact = heads * sum(min(block, q_len - key) * (q_len - key) for key in range(0, q_len, block))
    assert sum(work) == exact
    assert max(work) <= 1.15 * sum(work) / cores
