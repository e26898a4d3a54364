"""flash_attention_packed on every backend equals plain torch in float64, sequence by sequence."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
import torch
from ops_cases import DTYPES, assert_near, backends_here, check_against_oracle, not_contiguous, random, values_and_gradients
from torch import Tensor

from pyalpaca.ops import backend, flash_attention, flash_attention_packed, npu, reference
from pyalpaca.ops.backend import choose

BACKENDS = backends_here()
needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...] | None = None
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    causal: bool = True

    @property
    def starts(self) -> tuple[list[int], list[int]]:
        q, kv = (list(accumulate(lengths, initial=0)) for lengths in (self.lengths, self.kv_lengths or self.lengths))
        return q, kv

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        tokens, keys = (starts[-1] for starts in self.starts)
        kv = [random(keys, self.kv_heads, self.head_dim, dtype=dtype, seed=seed) for seed in (1, 2)]
        return [random(tokens, self.heads, self.head_dim, dtype=dtype), *kv]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """The output and the logsumexp."""
        chosen = choose("flash_attention_packed", q)
        return chosen.flash_attention_packed(q, k, v, *self.starts, self.causal, self.head_dim**-0.5)


CASES = [
    Case((7,)),
    Case((5, 64, 1, 33, 0, 40), heads=4),
    Case((5, 64, 1, 33, 0, 40), causal=False, heads=6, kv_heads=2),
    Case((5, 64, 1, 33, 0, 40), (5, 64, 1, 97, 3, 7), heads=4, kv_heads=1),
    Case((5, 64, 1, 33, 0, 40), (9, 0, 130, 97, 3, 7), causal=False, head_dim=40),
    Case((1, 300, 2, 129), head_dim=128, heads=3, kv_heads=1),
    Case((*(1,) * 50, 3), head_dim=8),
    Case((257, 31, 160), head_dim=256, heads=1, kv_heads=1),
    Case((0, 12, 0), (4, 12, 0)),
    Case((0, 0)),
]

MANY, FEW = Case((300, 20, 150, 1, 400), heads=4, kv_heads=2, head_dim=64), Case((3, 240), heads=7, kv_heads=1, head_dim=64)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(name: str, dtype: torch.dtype, case: Case) -> None:
    check_against_oracle(name, case.attend, case.inputs(dtype))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", [MANY, FEW], ids=["many", "few"])
def test_a_sequence_is_what_it_is_alone(name: str, threads: int, case: Case) -> None:
    inputs, before = case.inputs(torch.float32), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, lse, *gradients = values_and_gradients(name, case.attend, inputs)
        again = values_and_gradients(name, case.attend, inputs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip((out, lse, *gradients), again, strict=True))
    starts = case.starts[0]
    for begin, end in pairwise(starts):
        with backend(name):
            expected = flash_attention(*(x[None, begin:end] for x in inputs))
        assert_near(out[begin:end], expected[0].double(), 4e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_inputs(name: str) -> None:
    case = Case((30, 1, 19), head_dim=16)
    fused = random(50, 3, 2, 16)
    for inputs in (
        [fused[:, i] for i in range(3)],
        [random(2, 50, 16, seed=i).transpose(0, 1) for i in range(3)],
        [not_contiguous(random(50, 2, 16, seed=i)) for i in range(3)],
    ):
        check_against_oracle(name, case.attend, inputs)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_nan_stays_in_its_sequence(name: str) -> None:
    case = Case((40, 60, 30))
    q, k, v = case.inputs(torch.float32)
    k[50, 0, 3] = float("nan")
    with backend(name):
        out = flash_attention_packed(q, k, v, case.starts[0])
    assert torch.isfinite(out[:50]).all() and torch.isfinite(out[100:]).all()
    assert out[50:100, 0].isnan().all() and torch.isfinite(out[50:100, 1]).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_keys_without_queries_have_no_gradient_and_queries_without_keys_give_zero(name: str) -> None:
    case = Case((3, 0, 4), (3, 5, 0))
    out, lse, dq, dk, dv = values_and_gradients(name, case.attend, case.inputs(torch.float32))
    assert not dk[3:].any() and not dv[3:].any() and not out[3:].any() and not dq[3:].any()
    assert torch.isneginf(lse[:, 3:]).all()


def test_the_reference_has_the_gradient_of_what_it_computes() -> None:
    case = Case((3, 0, 2, 1), (3, 1, 4, 1), heads=4, head_dim=8)
    inputs = [x.requires_grad_() for x in case.inputs(torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v: case.attend(q, k, v)[0], inputs)


def test_starts_that_do_not_rise_to_the_end_are_refused() -> None:
    q = k = random(6, 2, 8)
    for starts in ([0, 4, 3, 6], [1, 6], [0, 5], [0, 7], [0], []):
        with pytest.raises(ValueError, match=r"starts are \[.*\], expected numbers that rise from 0 to 6,.* tokens of q"):
            flash_attention_packed(q, k, k, starts)
    with pytest.raises(ValueError, match=r"kv_starts are \[0, 2, 5\], expected numbers that rise from 0 to 6,.* tokens of k"):
        flash_attention_packed(q, k, k, [0, 2, 6], kv_starts=[0, 2, 5])
    with pytest.raises(ValueError, match="found 3 starts and 2 kv_starts, expected as many"):
        flash_attention_packed(q, k, k, [0, 2, 6], kv_starts=[0, 6])
    with pytest.raises(ValueError, match="q has 3 heads and k has 2"):
        flash_attention_packed(random(6, 3, 8), k, k, [0, 6])


@needs_cpp
def test_the_kernel_reads_nothing_that_starts_do_not_hold_together() -> None:
    q = k = random(6, 2, 8)

    def call(q_starts: list[int], longest: int, dtype: torch.dtype = torch.int64) -> None:
        starts = torch.tensor(q_starts, dtype=dtype)
        torch.ops.pyalpaca.flash_attention_packed(q, k, k, starts, torch.tensor([0, 2, 6]), longest, 4, True, 1.0)

    call([0, 3, 6], 3)
    for starts in ([0, 7, 6], [0, 3, 100], [-1, 3, 6]):
        with pytest.raises(ValueError, match=r"q_starts go from .*, expected rising numbers from 0 to 6"):
            call(starts, 3)
    with pytest.raises(ValueError, match="the longest sequence by q_starts is 3, expected that of the arguments, 2"):
        call([0, 3, 6], 2)
    with pytest.raises(ValueError, match=r"q_starts is Int .*, expected int64"):
        call([0, 3, 6], 3, torch.int32)
    with pytest.raises(ValueError, match="as many for keys as for queries"):
        call([0, 6], 6)


@needs_cpp
def test_a_second_derivative_is_refused() -> None:
    case = Case((4, 3))
    q, k, v = (x.requires_grad_() for x in case.inputs(torch.float32))
    with backend("cpp"):
        (dq,) = torch.autograd.grad(case.attend(q, k, v)[0].sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"flash_attention_packed has no second derivative in C\+\+"):
        dq.sum().backward()


def test_an_npu_without_our_kernel_attends_sequence_by_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, q_offset: int, scale: float) -> tuple[Tensor, Tensor]:
        lengths.append(q.shape[1])
        return reference.flash_attention(q, k, v, causal, q_offset, scale)

    monkeypatch.setattr(npu, "flash_attention", attend)
    case = Case((5, 1, 3))
    inputs = case.inputs(torch.float32)
    found = npu.flash_attention_packed(*inputs, *case.starts, True, 0.3)
    expected = reference.flash_attention_packed(*inputs, *case.starts, True, 0.3)
    assert lengths == [5, 1, 3] and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
