"""linear on every backend equals plain torch in float64, for few tokens and many, forward and backward."""

from __future__ import annotations

import weakref

import pytest
import torch
from ops_cases import (
    DTYPES,
    TOLERANCE,
    assert_near,
    backends_here,
    check_against_oracle,
    not_contiguous,
    random,
    values_and_gradients,
)

from pyalpaca.ops import backend, linear, linear_dweight, linear_dx, reference

BACKENDS = backends_here()
needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
# (tokens, outputs, inputs): one token, the few that are not worth a copy of the weight, and blocks with every kind of rest.
SHAPES = [
    (1, 1, 1),
    (1, 7, 33),
    (1, 130, 300),
    (2, 5, 64),
    (3, 9, 31),
    (7, 6, 70),
    (8, 33, 257),
    (9, 33, 31),
    (13, 129, 513),
    (100, 140, 520),
    (390, 17, 259),
]


def layer(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor]:
    return (linear(x, weight),)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_oracle(name: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    tokens, outputs, inputs = shape
    check_against_oracle(name, layer, [random(tokens, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype)])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_may_be_stored_narrower_than_the_activations(name: str, tokens: int, stored: torch.dtype) -> None:
    x, weight = random(tokens, 50), random(40, 50, dtype=stored)
    y, dx, dweight = values_and_gradients(name, layer, [x, weight])
    expected = values_and_gradients("reference", layer, [x.double(), weight.double()])
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.float32, torch.float32, stored)
    for found, wanted, dtype in zip((y, dx, dweight), expected, (x.dtype, x.dtype, stored), strict=True):
        assert_near(found, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("name", BACKENDS)
def test_strides_and_leading_dimensions(name: str) -> None:
    for x, weight in (
        (not_contiguous(random(2, 3, 40)), not_contiguous(random(9, 40))),
        (random(5, 40, 3).transpose(1, 2), random(40, 9).T),
        (random(40), random(9, 40)),
        (random(1, 40).expand(20, 40), random(30, 60)[:, 7:47]),
    ):
        check_against_oracle(name, layer, [x, weight])
        y = layer(x, weight)[0]
        assert y.shape == (*x.shape[:-1], weight.shape[0])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (20, 3, 0)], ids=str)
def test_empty_shapes(name: str, shape: tuple[int, int, int]) -> None:
    tokens, outputs, inputs = shape
    found = values_and_gradients(name, layer, [random(tokens, inputs), random(outputs, inputs)])
    assert [tuple(x.shape) for x in found] == [(tokens, outputs), (tokens, inputs), (outputs, inputs)]
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [4, 30])
def test_infinities_and_nan_stay_in_their_row_and_column(name: str, dtype: torch.dtype, tokens: int) -> None:
    x, weight = random(tokens, 37, dtype=dtype), random(19, 37, dtype=dtype)
    x[1, 36], x[2, 3], weight[18, 5] = float("inf"), float("nan"), float("-inf")
    with backend(name):
        found = linear(x, weight)
    assert_near(found, reference.linear(x.double(), weight.double()), TOLERANCE[dtype])


@pytest.mark.parametrize("name", BACKENDS)
def test_the_same_values_in_every_run(name: str) -> None:
    inputs = [random(200, 300), random(170, 300)]
    first, second = (values_and_gradients(name, layer, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_cpp
def test_values_do_not_depend_on_the_number_of_threads() -> None:
    inputs = [random(400, 600, dtype=torch.bfloat16), random(270, 600, dtype=torch.bfloat16)]
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(values_and_gradients("cpp", layer, inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_cpp
def test_the_gradients_have_gradients() -> None:
    def squared_gradient(name: str, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        with backend(name):
            first = torch.autograd.grad(linear(x, weight).pow(3).sum(), (x, weight), create_graph=True)
            return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, weight))

    x, weight = random(11, 12) / 4, random(13, 12) / 4
    expected = squared_gradient("reference", x.double(), weight.double())
    for found, wanted in zip(squared_gradient("cpp", x, weight), expected, strict=True):
        assert_near(found, wanted, 10 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", BACKENDS)
def test_the_gradients_by_name_are_those_of_autograd(name: str) -> None:
    x, weight, dy = random(2, 12, 20), random(30, 20), random(2, 12, 30)
    with backend(name):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        dx, dweight = torch.autograd.grad(linear(*leaves), leaves, dy)
        assert torch.equal(linear_dx(dy, weight), dx)
        assert torch.equal(linear_dweight(dy, x), dweight)


@needs_cpp
def test_wrong_arguments_are_named() -> None:
    with backend("cpp"):
        with pytest.raises(ValueError, match=r"x has shape \[2, 4\] and weight \[3, 5\], expected \(..., K\) and \(N, K\)"):
            linear(random(2, 4), random(3, 5))
        with pytest.raises(ValueError, match="weight is Double, expected float32, bfloat16 or float16"):
            linear(random(2, 4), random(3, 4, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"dy has shape \[2, 3\] and weight \[4, 5\]"):
            linear_dx(random(2, 3), random(4, 5))
        with pytest.raises(ValueError, match=r"dy has shape \[2, 3\] and x \[3, 5\]"):
            linear_dweight(random(2, 3), random(3, 5))


@pytest.mark.parametrize("name", BACKENDS)
def test_only_what_a_gradient_takes_is_kept(name: str) -> None:
    def kept(x_learns: bool, weight_learns: bool) -> set[str]:
        """Which operands live on when nobody but the graph holds them."""
        operands = {"x": random(3, 5).requires_grad_(x_learns) * 1, "weight": random(4, 5).requires_grad_(weight_learns) * 1}
        held = {key: weakref.ref(operand) for key, operand in operands.items()}
        with backend(name):
            y = linear(operands["x"], operands["weight"])
        del operands
        found = {key for key, operand in held.items() if operand() is not None}
        assert y.requires_grad == (x_learns or weight_learns)
        return found

    assert kept(True, False) == {"weight"}
    assert kept(False, True) == {"x"}
    assert kept(True, True) == {"x", "weight"}
    assert kept(False, False) == set()
