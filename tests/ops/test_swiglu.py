"""swiglu on every backend equals plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from ops_cases import DTYPES, backends_here, check_against_oracle, not_contiguous, random, values_and_gradients
from torch import Tensor

from pyalpaca.ops import backend, reference, swiglu

BACKENDS = backends_here()
SHAPES = [(1,), (3, 7), (2, 5, 64), (2, 3, 4, 33), (1, 20000), (300, 100), (17, 4096)]


def gate(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return (swiglu(gate, up),)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_oracle(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_against_oracle(name, gate, [3 * random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_of_one_tensor_and_other_strides(name: str, dtype: torch.dtype) -> None:
    fused = random(4, 3, 80, dtype=dtype)
    check_against_oracle(name, gate, list(fused.chunk(2, -1)))
    check_against_oracle(name, gate, [not_contiguous(fused), random(80, 4, 3, dtype=dtype).permute(1, 2, 0)])


@pytest.mark.parametrize("name", BACKENDS)
def test_the_gradient_of_a_fused_tensor_is_that_of_its_halves(name: str) -> None:
    check_against_oracle(name, lambda fused: gate(*fused.chunk(2, -1)), [random(6, 50)])


@pytest.mark.parametrize("name", BACKENDS)
def test_an_expanded_gradient(name: str) -> None:
    x, y = random(4, 16).requires_grad_(), random(4, 16, seed=1).requires_grad_()
    with backend(name):
        swiglu(x, y).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 0, 16), (3, 0)], ids=str)
def test_nothing_in_nothing_out(name: str, shape: tuple[int, ...]) -> None:
    found = values_and_gradients(name, gate, [torch.empty(shape), torch.empty(shape)])
    assert all(x.shape == shape for x in found)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_of_any_size_infinities_and_nan(name: str, dtype: torch.dtype) -> None:
    sizes = [0.0, -0.0, 20.0, -20.0, 86.0, -86.0, 90.0, -90.0, 1e4, -1e4, float("inf"), float("-inf"), float("nan")]
    gates = torch.tensor(sizes * 5, dtype=dtype)
    for one in gates[: len(sizes)]:  # by itself: the tolerance is relative to the largest of a tensor
        check_against_oracle(name, gate, [one.expand(19), torch.ones(19, dtype=dtype)])
    ups = random(len(gates), dtype=dtype)
    ups[3], ups[2] = float("nan"), float("inf")
    check_against_oracle(name, gate, [gates, ups])


def test_the_reference_has_the_gradient_of_what_it_computes() -> None:
    inputs = [random(3, 6, dtype=torch.float64, seed=seed).requires_grad_() for seed in range(2)]
    assert torch.autograd.gradcheck(reference.swiglu, inputs)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_wrong_arguments_are_named() -> None:
    with backend("cpp"):
        with pytest.raises(ValueError, match=r"up has shape \[2, 5\], expected \[2, 4\]"):
            swiglu(random(2, 4), random(2, 5))
        with pytest.raises(ValueError, match="up is Half on cpu, expected that of gate: Float on cpu"):
            swiglu(random(2, 4), random(2, 4).half())


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_a_second_derivative_is_refused() -> None:
    x, y = random(2, 8).requires_grad_(), random(2, 8).requires_grad_()
    with backend("cpp"):
        (dx,) = torch.autograd.grad(swiglu(x, y).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative in C\+\+; run it within .*backend\("reference"\)'):
        dx.sum().backward()
