"""What the operator tests share: the backends here, the float64 oracle, tolerances by dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyalpaca.ops import backend, backend_report

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The largest error allowed, relative to the largest value of the oracle: four roundings to a half type (the gradients of
# attention are computed from the rounded output), some thirty to fp32 (sums).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}


def backends_here() -> list[str]:
    """The backends that can serve an operator on this machine."""
    names = []
    for name in ("reference", "cpp", "npu"):
        with backend(name):
            if backend_report()[0].backend == name:
                names.append(name)
    return names


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def values_and_gradients(
    name: str, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], constants: Sequence[Tensor] = ()
) -> list[Tensor]:
    """The results of `function` on the backend `name`, and the gradients of the inputs for a random gradient of the first."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with backend(name):
        outputs = function(*leaves, *constants)
    gradient = random(*outputs[0].shape, dtype=torch.float64, seed=7).to(leaves[0].dtype)
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs[0], leaves, gradient))


def check_against_oracle(
    name: str,
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor] = (),
    ease: float = 1.0,
) -> None:
    """Assert that results and gradients of the backend `name` are those of plain torch in float64, up to `ease` x rounding."""
    found = values_and_gradients(name, function, inputs, constants)
    oracle = values_and_gradients("reference", function, [x.double() for x in inputs], [x.double() for x in constants])
    for position, (x, expected) in enumerate(zip(found, oracle, strict=True)):
        assert_near(x, expected, ease * TOLERANCE[inputs[0].dtype], f"result {position}")


def assert_near(x: Tensor, expected: Tensor, tolerance: float, what: str = "result") -> None:
    """Assert equal infinities and NaN, and finite values that differ by at most `tolerance` of the largest."""
    assert x.shape == expected.shape, what
    x = x.double()
    finite = torch.isfinite(expected)
    torch.testing.assert_close(x[~finite], expected[~finite], equal_nan=True, msg=f"{what}: infinities or NaN differ")
    if finite.any():
        error = (x[finite] - expected[finite]).abs().max().item()
        largest = max(expected[finite].abs().max().item(), 1e-3)
        assert error <= tolerance * largest, f"{what}: error {error:.3e}, largest value {largest:.3e}"


def not_contiguous(x: Tensor) -> Tensor:
    """The same values with every dimension strided, the last one too."""
    wide = x.new_zeros([2 * size for size in x.shape])
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view
