"""rope on every backend equals plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from ops_cases import DTYPES, TOLERANCE, assert_near, backends_here, check_against_oracle, not_contiguous, random
from torch import Tensor

from pyalpaca.ops import backend, reference, rope

BACKENDS = backends_here()
SHAPES = [(1, 1, 1, 2), (2, 5, 3, 6), (1, 7, 2, 20), (2, 9, 4, 64), (1, 33, 5, 128)]


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    angle = random(*shape)
    return angle.cos(), angle.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return (rope(x, cos, sin),)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_batch", [False, True], ids=["one_position", "position_per_batch"])
def test_equals_the_oracle(name: str, dtype: torch.dtype, shape: tuple[int, ...], per_batch: bool) -> None:
    batch, tokens, _, head_dim = shape
    cos, sin = angles(*([batch] if per_batch else []), tokens, head_dim // 2)
    check_against_oracle(name, turn, [random(*shape, dtype=dtype)], [cos, sin])


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_inputs(name: str) -> None:
    cos, sin = angles(5, 8)
    fused = random(2, 5, 3, 4, 16)
    for x in (fused[:, :, 1], random(2, 4, 5, 16).transpose(1, 2), not_contiguous(random(2, 5, 4, 16))):
        check_against_oracle(name, turn, [x], [cos, sin])
    check_against_oracle(name, turn, [fused[:, :, 0]], [not_contiguous(cos), not_contiguous(sin)])


@pytest.mark.parametrize("name", BACKENDS)
def test_no_tokens(name: str) -> None:
    with backend(name):
        assert rope(torch.empty(2, 0, 4, 8), torch.empty(0, 4), torch.empty(0, 4)).shape == (2, 0, 4, 8)


@pytest.mark.parametrize("name", BACKENDS)
def test_infinities_and_nan_stay_in_their_pair(name: str) -> None:
    x = random(1, 2, 2, 32)
    x[0, 0, 1, 3], x[0, 1, 0, 30] = float("nan"), float("inf")
    check_against_oracle(name, turn, [x], list(angles(2, 16)))


@pytest.mark.parametrize("name", BACKENDS)
def test_lengths_are_kept(name: str) -> None:
    x = random(2, 6, 3, 24)
    with backend(name):
        assert_near(rope(x, *angles(6, 12)).norm(dim=-1), x.double().norm(dim=-1), TOLERANCE[torch.float32])


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_every_derivative_exists_in_cpp() -> None:
    x = random(1, 3, 2, 8).requires_grad_()
    cos, sin = angles(3, 4)
    with backend("cpp"):
        (dx,) = torch.autograd.grad(rope(x, cos, sin).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(dx.sum(), x)
    with backend("reference"):
        (dx,) = torch.autograd.grad(rope(x, cos, sin).pow(3).sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(dx.sum(), x)
    torch.testing.assert_close(second, expected)


def test_the_reference_has_the_gradient_of_what_it_computes() -> None:
    cos, sin = (x.double() for x in angles(3, 2))
    x = random(1, 3, 2, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.rope(x, cos, sin), [x])


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_wrong_arguments_are_named() -> None:
    with backend("cpp"):
        with pytest.raises(ValueError, match=r"cos has shape \[4, 4\], expected \[3, 4\]"):
            rope(random(1, 3, 2, 8), *angles(4, 4))
        with pytest.raises(ValueError, match="with d even"):
            rope(random(1, 3, 2, 7), *angles(3, 3))
        with pytest.raises(ValueError, match="cos is Half on cpu, expected float32"):
            rope(random(1, 3, 2, 8), angles(3, 4)[0].half(), angles(3, 4)[1])
