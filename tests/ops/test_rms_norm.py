"""rms_norm on every backend equals plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from ops_cases import DTYPES, backends_here, check_against_oracle, not_contiguous, random, values_and_gradients
from torch import Tensor

from pyalpaca.ops import backend, reference, rms_norm

BACKENDS = backends_here()
SHAPES = [(1, 8), (3, 7), (2, 5, 64), (2, 3, 4, 33), (300, 100), (1000, 1), (17, 4096)]


def norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (rms_norm(x, weight, 1e-6),)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_oracle(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_against_oracle(name, norm, [random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)])


@pytest.mark.parametrize("name", BACKENDS)
def test_the_weight_may_have_a_dtype_of_its_own(name: str) -> None:
    x, weight = random(5, 64, dtype=torch.bfloat16), random(64)
    check_against_oracle(name, norm, [x, weight])
    assert values_and_gradients(name, norm, [x, weight])[2].dtype == torch.float32


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_rows_and_columns(name: str) -> None:
    weight = random(40)
    for x in (random(6, 50)[:, :40], random(40, 6).t(), not_contiguous(random(3, 4, 40)), random(4, 3, 40).transpose(0, 1)):
        check_against_oracle(name, norm, [x, weight])


@pytest.mark.parametrize("name", BACKENDS)
def test_an_expanded_gradient(name: str) -> None:
    x = random(4, 16).requires_grad_()
    weight = random(16).requires_grad_()
    with backend(name):
        rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_no_rows(name: str) -> None:
    x, weight = torch.empty(2, 0, 16), random(16)
    y, dx, dweight = values_and_gradients(name, norm, [x, weight])
    assert y.shape == dx.shape == (2, 0, 16)
    assert torch.equal(dweight, torch.zeros(16))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan_stay_in_their_row(name: str, dtype: torch.dtype) -> None:
    x = random(4, 24, dtype=dtype)
    x[1, 3], x[2, 23] = float("nan"), float("inf")
    check_against_oracle(name, lambda x, w: (norm(x, w)[0],), [x, random(24, dtype=dtype)])


@pytest.mark.parametrize("name", BACKENDS)
def test_zeros_give_zeros(name: str) -> None:
    with backend(name):
        assert torch.equal(rms_norm(torch.zeros(2, 16), random(16), 1e-6), torch.zeros(2, 16))


@pytest.mark.parametrize("name", BACKENDS)
def test_the_same_gradients_in_every_run(name: str) -> None:
    inputs = [random(501, 120), random(120)]
    first, second = (values_and_gradients(name, norm, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_reference_has_the_gradient_of_what_it_computes() -> None:
    inputs = [random(3, 6, dtype=torch.float64).requires_grad_(), random(6, dtype=torch.float64).requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, w: reference.rms_norm(x, w, 1e-3), inputs)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_wrong_arguments_are_named() -> None:
    with backend("cpp"):
        with pytest.raises(ValueError, match=r"weight has shape \[5\], expected \[4\]"):
            rms_norm(random(2, 4), random(5), 1e-6)
        with pytest.raises(ValueError, match="weight is Double, expected float32, bfloat16 or float16"):
            rms_norm(random(2, 4), random(4, dtype=torch.float64), 1e-6)
        with pytest.raises(ValueError, match=r"expected \(..., D\) with D at least 1"):
            rms_norm(torch.empty(2, 0), torch.empty(0), 1e-6)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_a_second_derivative_is_refused() -> None:
    x, weight = random(2, 8).requires_grad_(), random(8).requires_grad_()
    with backend("cpp"):
        (dx,) = torch.autograd.grad(rms_norm(x, weight, 1e-6).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'no second derivative in C\+\+; run it within .*backend\("reference"\)'):
        dx.sum().backward()
