"""adamw_ takes the steps of torch.optim.AdamW, whatever the dtypes and the sizes of a list; grad_norm is the norm of all."""

from __future__ import annotations

import math

import pytest
import torch
from ops_cases import DTYPES, backends_here, random
from torch import Tensor

from pyalpaca.ops import adamw_, backend, grad_norm

BACKENDS = backends_here()
SHAPES = [(7, 5), (5,), (1,), (0, 3), (300, 257), (33, 4096)]
DECAYS = [0.3, 0.0, 0.1, 0.3, 0.2, 0.3]


def zeros() -> list[Tensor]:
    return [torch.zeros(shape) for shape in SHAPES]


def weights() -> list[Tensor]:
    return [random(*shape) for shape in SHAPES]


def grads(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random(*shape, seed=100 + step).to(dtype) for shape in SHAPES]


def oracle(dtype: torch.dtype, scale: float) -> list[list[Tensor]]:
    """The weights after each of five steps of torch.optim.AdamW in float64."""
    own = [torch.nn.Parameter(w.double()) for w in weights()]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(own, DECAYS, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    seen = []
    for step in range(5):
        for p, grad in zip(own, grads(step, dtype), strict=True):
            p.grad = grad.double() * scale
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.step()
        seen.append([p.detach().clone() for p in own])
    return seen


def take_step(step: int, w: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], **more: object) -> None:
    rest = {"weight_decays": DECAYS, "lr": 0.1 / max(step + 1, 1), "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, **more}
    adamw_(w, g, m, v, step=step + 1, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("copied", [None, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_oracle(name: str, dtype: torch.dtype, copied: torch.dtype | None) -> None:
    w, m, v = weights(), zeros(), zeros()
    copies = [x.to(copied) for x in w] if copied else []
    with backend(name):
        for step, expected in enumerate(oracle(dtype, 0.37)):
            take_step(step, w, grads(step, dtype), m, v, grad_scale=0.37, copies=copies)
            for x, y in zip(w, expected, strict=True):
                torch.testing.assert_close(x.double(), y, atol=2e-6, rtol=1e-6)
            assert all(torch.equal(narrow, x.to(narrow.dtype)) for narrow, x in zip(copies, w, strict=bool(copied)))


@pytest.mark.parametrize("name", BACKENDS)
def test_every_element_as_if_it_were_alone(name: str) -> None:
    # Vectors, tails and pieces of a long tensor all do the same arithmetic.
    w, m, v = weights(), zeros(), zeros()
    flat = [torch.cat([x.flatten() for x in tensors]) for tensors in (w, grads(0), m, v)]
    with backend(name):
        take_step(0, w, grads(0), m, v, weight_decays=[0.3] * len(w))
        take_step(0, *([x] for x in flat), weight_decays=[0.3])
    assert torch.equal(torch.cat([x.flatten() for x in w]), flat[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_may_lie_in_any_order(name: str) -> None:
    first, second = random(6, 40), random(6, 40)
    grad = random(40, 6).T
    with backend(name):
        for w, g in ((first, grad), (second, grad.contiguous())):
            take_step(0, [w], [g], [torch.zeros(6, 40)], [torch.zeros(6, 40)], weight_decays=[0.1])
        assert torch.equal(first, second)
        torch.testing.assert_close(grad_norm([grad]), grad.double().norm())
        wide = random(6, 80)
        torch.testing.assert_close(grad_norm([wide[:, ::2]]), wide[:, ::2].double().norm())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_of_all_of_them(name: str, dtype: torch.dtype) -> None:
    mixed = [*grads(0, dtype), random(1000), random(9, dtype=torch.bfloat16)]
    with backend(name):
        found = grad_norm(mixed)
        assert found.dtype == torch.float64 and found.shape == ()
        torch.testing.assert_close(found, torch.cat([g.double().flatten() for g in mixed]).norm(), rtol=1e-6, atol=0)
        assert grad_norm([torch.empty(0)]).item() == 0.0


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("place", [0, 17, 40000])
def test_the_norm_finds_infinities_and_nan_and_no_others(name: str, place: int) -> None:
    g = torch.full((50001,), 3e38)
    with backend(name):
        assert grad_norm([g]).item() == pytest.approx(3e38 * math.sqrt(len(g)))
        g[place] = float("inf")
        assert grad_norm([random(5), g]).item() == math.inf
        g[place] = float("nan")
        assert math.isnan(grad_norm([random(5), g]).item())


@pytest.mark.parametrize("name", BACKENDS)
def test_a_gradient_that_is_not_finite_spoils_its_own_weight_only(name: str) -> None:
    w, g = torch.ones(40), torch.ones(40)
    g[3], g[39] = float("nan"), float("inf")
    with backend(name):
        take_step(0, [w], [g], [torch.zeros(40)], [torch.zeros(40)], weight_decays=[0.0])
    assert torch.isfinite(w).sum() == 38 and not torch.isfinite(w[[3, 39]]).any()


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_the_same_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            w, m, v = weights(), zeros(), zeros()
            take_step(0, w, grads(0), m, v)
            found.append([*w, grad_norm(grads(1))])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for others in found[1:] for x, y in zip(found[0], others, strict=True))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_wrong_arguments_are_named() -> None:
    w, m, v = [random(3, 4)], [torch.zeros(3, 4)], [torch.zeros(3, 4)]
    with backend("cpp"):
        with pytest.raises(ValueError, match=r"1 weights, 2 grads, .* expected as many of each, or no copies"):
            take_step(0, w, [w[0], w[0]], m, v, weight_decays=[0.0])
        with pytest.raises(ValueError, match=r"a grad has shape \[4, 3\], expected \[3, 4\]"):
            take_step(0, w, [random(4, 3)], m, v, weight_decays=[0.0])
        with pytest.raises(ValueError, match="an exp_avg is BFloat16, expected float32"):
            take_step(0, w, w, [m[0].bfloat16()], v, weight_decays=[0.0])
        with pytest.raises(ValueError, match=r"a weight of shape .* is not contiguous"):
            take_step(0, [random(4, 3).T], w, m, v, weight_decays=[0.0])
        with pytest.raises(ValueError, match="step is 0, expected the number of this step, from 1 on"):
            take_step(-1, w, w, m, v, weight_decays=[0.0])
