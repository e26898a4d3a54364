"""flash_attention on every backend equals plain torch in float64, which holds all the scores."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from ops_cases import DTYPES, assert_near, backends_here, check_against_oracle, not_contiguous, random, values_and_gradients
from torch import Tensor

from pyalpaca.ops import backend, flash_attention, flash_attention_lse, reference

BACKENDS = backends_here()


@dataclass(frozen=True)
class Case:
    batch: int = 1
    queries: int = 16
    keys: int = 16
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    causal: bool = True
    q_offset: int = 0

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        q = random(self.batch, self.queries, self.heads, self.head_dim, dtype=dtype)
        return [q] + [random(self.batch, self.keys, self.kv_heads, self.head_dim, dtype=dtype, seed=s) for s in (1, 2)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return flash_attention_lse(q, k, v, causal=self.causal, q_offset=self.q_offset)


CASES = [
    Case(batch=2),
    Case(head_dim=8, queries=5, keys=5),
    Case(head_dim=256, queries=50, keys=50),
    Case(head_dim=128, queries=130, keys=130),
    Case(head_dim=40, queries=97, keys=97, batch=2),
    Case(queries=33, keys=200, causal=False),
    Case(queries=200, keys=33, causal=False),
    Case(heads=6, kv_heads=2, queries=70, keys=70, batch=2),
    Case(heads=8, kv_heads=1, queries=31, keys=150, q_offset=119),
    Case(heads=7, kv_heads=1, queries=140, keys=140, head_dim=40),
    Case(queries=1, keys=300, q_offset=299, head_dim=64, heads=4),
    Case(queries=1, keys=129, q_offset=128, head_dim=72, heads=4, kv_heads=1),
    Case(queries=3, keys=40, q_offset=20),
    Case(queries=60, keys=60, q_offset=-25),
    Case(queries=300, keys=300, q_offset=-150),
    Case(queries=20, keys=20, q_offset=100),
    Case(queries=150, keys=20),
    Case(queries=257, keys=511, q_offset=254, heads=1, kv_heads=1, head_dim=64),
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(name: str, dtype: torch.dtype, case: Case) -> None:
    check_against_oracle(name, case.attend, case.inputs(dtype))


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_inputs(name: str) -> None:
    fused = random(2, 50, 3, 2, 16)
    case = Case(batch=2, queries=50, keys=50, head_dim=16)
    for inputs in (
        [fused[:, :, i] for i in range(3)],
        [random(2, 2, 50, 16, seed=i).transpose(1, 2) for i in range(3)],
        [not_contiguous(random(2, 50, 2, 16, seed=i)) for i in range(3)],
        [fused[:, :, 0], *(random(1, 50, 1, 16, seed=i).expand(2, 50, 2, 16) for i in range(2))],
    ):
        check_against_oracle(name, case.attend, inputs)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_query_that_sees_no_key_gives_zero(name: str) -> None:
    case = Case(queries=10, keys=10, q_offset=-4)
    out, lse, dq, _, dv = values_and_gradients(name, case.attend, case.inputs(torch.float32))
    assert torch.equal(out[:, :4], torch.zeros_like(out[:, :4]))
    assert torch.equal(dq[:, :4], torch.zeros_like(dq[:, :4]))
    assert torch.equal(lse[..., :4], torch.full_like(lse[..., :4], float("-inf")))
    assert torch.isfinite(lse[..., 4:]).all()
    assert torch.equal(dv[:, 6:], torch.zeros_like(dv[:, 6:]))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", [Case(queries=0), Case(keys=0), Case(batch=0), Case(keys=0, causal=False)], ids=str)
def test_empty_inputs(name: str, case: Case) -> None:
    out, lse, *gradients = values_and_gradients(name, case.attend, case.inputs(torch.float32))
    assert torch.equal(out, torch.zeros(case.batch, case.queries, case.heads, case.head_dim))
    assert torch.equal(lse, torch.full((case.batch, case.heads, case.queries), float("-inf")))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("queries", [2, 60])
def test_a_nan_reaches_the_queries_that_see_it(name: str, queries: int) -> None:
    q, k, v = Case(queries=queries, keys=100).inputs(torch.float32)
    k[0, 10, 0, 3] = float("nan")
    with backend(name):
        out = flash_attention(q, k, v, q_offset=9)
    assert torch.isfinite(out[0, 0]).all()
    assert out[0, 1:, 0].isnan().all()
    assert torch.isfinite(out[0, :, 1]).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_scores_of_minus_infinity_weigh_nothing(name: str) -> None:
    case = Case(queries=20, keys=200, causal=False, head_dim=8)
    q, k, v = case.inputs(torch.float32)
    q[..., 0] = 1.0
    k[:, ::2, :, 0] = float("-inf")
    k[:, :150, :, 0] = float("-inf")
    with backend(name):
        out, lse = case.attend(q, k, v)
    expected, expected_lse = reference.flash_attention(q.double(), k.double(), v.double(), False, 0, 8**-0.5)
    assert_near(out, expected, 4e-6)
    assert_near(lse, expected_lse, 4e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_large_scores_do_not_overflow(name: str) -> None:
    case = Case(queries=40, keys=140, q_offset=100)
    q, k, v = case.inputs(torch.float32)
    # Scores of some hundred are themselves rounded by 1e-5, and the exponential makes that a relative error.
    check_against_oracle(name, case.attend, [q * 30, k, v], ease=20)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_keys_that_nobody_sees_are_not_read() -> None:
    q, k, v = Case(queries=4, keys=100).inputs(torch.float32)
    k[:, 50:], v[:, 50:] = float("nan"), float("nan")
    with backend("cpp"):
        assert torch.isfinite(flash_attention(q, k, v, q_offset=46)).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_parts_merge_by_their_logsumexp(name: str) -> None:
    q, k, v = Case(queries=30, keys=90).inputs(torch.float32)
    with backend(name):
        whole = flash_attention(q, k, v, causal=False)
        parts = [flash_attention_lse(q, k[:, a:b], v[:, a:b], causal=False) for a, b in ((0, 40), (40, 90))]
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), dim=0).transpose(2, 3)[..., None]
    assert_near(sum(w * out for w, (out, _) in zip(weights, parts, strict=True)), whole.double(), 4e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_same_gradients_in_every_run(name: str) -> None:
    case = Case(queries=120, keys=120, heads=4)
    first, second = (values_and_gradients(name, case.attend, case.inputs(torch.float32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_do_not_depend_on_the_number_of_threads(name: str) -> None:
    case, before, found = Case(queries=200, keys=200, heads=7, kv_heads=1, head_dim=64), torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(values_and_gradients(name, case.attend, case.inputs(torch.float32)))
        finally:
            torch.set_num_threads(before)
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y) if name == "cpp" else torch.allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("case", [Case(heads=4, queries=4, keys=5, head_dim=8, q_offset=-1), Case(queries=3, keys=4)], ids=str)
def test_the_reference_has_the_gradient_of_what_it_computes(case: Case) -> None:
    inputs = [x.requires_grad_() for x in case.inputs(torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v: case.attend(q, k, v)[0], inputs)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="q has 3 heads and k has 2"):
        flash_attention(random(1, 4, 3, 8), random(1, 4, 2, 8), random(1, 4, 2, 8))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_wrong_arguments_are_named() -> None:
    q, k, v = Case().inputs(torch.float32)
    with backend("cpp"):
        with pytest.raises(ValueError, match="k is Half on cpu, expected that of q: Float on cpu"):
            flash_attention(q, k.half(), v)
        with pytest.raises(ValueError, match="v has shape"):
            flash_attention(q, k, v[:, :3])
        with pytest.raises(ValueError, match="head_dim is 12, the C\\+\\+ kernel takes multiples of 8 up to 256"):
            flash_attention(q[..., :12], k[..., :12], v[..., :12])
        with pytest.raises(ValueError, match="head_dim is 12, expected a multiple of 8 up to 256"):
            torch.ops.pyalpaca.flash_attention(q[..., :12], k[..., :12], v[..., :12], True, 0, 1.0)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_a_second_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in Case().inputs(torch.float32))
    with backend("cpp"):
        (dq,) = torch.autograd.grad(flash_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"flash_attention has no second derivative in C\+\+"):
        dq.sum().backward()


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_the_scores_are_never_held_whole() -> None:
    program = """
import resource, torch
from pyalpaca.ops import flash_attention
q = torch.randn(1, 6000, 1, 16, requires_grad=True)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
flash_attention(q[:, :64], q[:, :64], q[:, :64]).sum().backward()
before = peak()
flash_attention(q, q, q).sum().backward()
print(peak() - before)
"""
    command = [sys.executable, "-c", program]
    extra_kb = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert extra_kb < 6000 * 6000 * 4 / 1024 / 4, "a quarter of the scores of one head"
