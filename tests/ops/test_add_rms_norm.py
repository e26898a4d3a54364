"""add_rms_norm on every backend equals plain torch in float64, and bit by bit the sum and the norm taken one by one."""

from __future__ import annotations

import pytest
import torch
from ops_cases import DTYPES, backends_here, check_against_oracle, not_contiguous, random, values_and_gradients
from torch import Tensor

from pyalpaca.ops import add_rms_norm, backend, rms_norm

BACKENDS = backends_here()
SHAPES = [(1, 8), (3, 7), (2, 5, 64), (2, 3, 4, 33), (300, 100), (1000, 1), (17, 4096)]


def both(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Both results side by side, so that the gradient of each comes into those of the arguments."""
    y, total = add_rms_norm(x, residual, weight, 1e-6)
    return (torch.cat((y, total), -1),)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1), random(shape[-1], dtype=dtype)]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_oracle(name: str, shape: tuple[int, ...]) -> None:
    check_against_oracle(name, both, inputs(*shape))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_oracle_where_the_sum_is_exact(name: str, dtype: torch.dtype) -> None:
    # The oracle does not round the sum, the operator does: integers up to 8 lose nothing by it.
    x, residual, weight = inputs(40, 72, dtype=dtype)
    check_against_oracle(name, both, [(2 * x).round(), (2 * residual).round(), weight])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 37), (300, 128)], ids=str)
def test_equals_the_sum_and_the_norm_one_by_one(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual, weight = inputs(*shape, dtype=dtype)
    with backend(name):
        y, total = add_rms_norm(x, residual, weight, 1e-6)
        assert torch.equal(total, x + residual)
        assert torch.equal(y, rms_norm(x + residual, weight, 1e-6))


@pytest.mark.parametrize("name", BACKENDS)
def test_either_result_may_go_unused(name: str) -> None:
    check_against_oracle(name, lambda *given: (add_rms_norm(*given, 1e-6)[0],), inputs(6, 20))
    x, residual, weight = (tensor.requires_grad_() for tensor in inputs(6, 20))
    with backend(name):
        total = add_rms_norm(x, residual, weight, 1e-6)[1]
    gradient = random(6, 20, seed=3)
    found = torch.autograd.grad(total, (x, residual, weight), gradient, allow_unused=True)
    assert torch.equal(found[0], gradient) and torch.equal(found[1], gradient) and found[2] is None


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_rows_and_columns(name: str) -> None:
    x, residual, weight = inputs(4, 3, 40)
    check_against_oracle(name, both, [not_contiguous(x), residual.transpose(0, 1).contiguous().transpose(0, 1), weight])
    check_against_oracle(name, both, [random(12, 50)[:, :40], random(40, 12).T, weight])


@pytest.mark.parametrize("name", BACKENDS)
def test_no_rows(name: str) -> None:
    y, *gradients = values_and_gradients(name, both, [torch.empty(2, 0, 16), torch.empty(2, 0, 16), random(16)])
    assert y.shape == (2, 0, 32)
    assert torch.equal(gradients[-1], torch.zeros(16))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan_stay_in_their_row(name: str, dtype: torch.dtype) -> None:
    x, residual, weight = inputs(5, 24, dtype=dtype)
    x, residual = (2 * x).round(), (2 * residual).round()
    x[1, 3], residual[2, 23], x[3, 0], residual[3, 0] = float("nan"), float("inf"), float("inf"), float("-inf")
    check_against_oracle(name, both, [x, residual, weight])


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_wrong_arguments_are_named() -> None:
    x, residual, weight = inputs(2, 8)
    with backend("cpp"):
        with pytest.raises(ValueError, match=r"residual has shape \[1, 8\], expected \[2, 8\]"):
            add_rms_norm(x, residual[:1], weight, 1e-6)
        with pytest.raises(ValueError, match="residual is Half on cpu, expected that of x: Float on cpu"):
            add_rms_norm(x, residual.half(), weight, 1e-6)
