"""Each record is true: ours and every peer compute the same of its inputs; the bytes and flops it counts are those of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pyalpaca.bench.kernels.measure import Plan, prepared
from pyalpaca.bench.kernels.operator import DIRECTIONS, Case, Operator, Peer
from pyalpaca.bench.kernels.records import OPERATORS
from pyalpaca.ops import backend, backend_report

with backend("cpp"):
    built = backend_report()[0].backend == "cpp"

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.004, "int8": 1e-5, "int4": 1e-5}
IN_PLACE = {"adamw_", "rope_qk_store"}


def cases() -> Iterator[tuple[Operator, Case]]:
    for operator in OPERATORS.values():
        for label in (label for label in operator.shapes if label.startswith("small/")):
            for dtype in operator.dtypes:
                yield operator, Case(operator.shapes[label], dtype)


def name(value: Any) -> str:
    return value.name if isinstance(value, Operator) else value.dtype


def inputs_of(operator: Operator, case: Case) -> list[Any]:
    torch.manual_seed(3)
    return operator.make(case)


def flat(values: Any) -> list[Tensor]:
    """The tensors in it, in order."""
    if isinstance(values, Tensor):
        return [values.detach()]
    return [x for value in values for x in flat(value)] if isinstance(values, (list, tuple)) else []


def outcome(operator: Operator, case: Case, peer: Peer | None) -> list[Tensor]:
    """What a call gives, and what it leaves in its inputs where it works in place."""
    inputs = inputs_of(operator, case)
    result = prepared(peer.build() if peer else operator.ours, peer.prepare(inputs) if peer else inputs, "fwd")()
    return flat(result) + (flat(inputs) if operator.name in IN_PLACE else [])


@pytest.mark.skipif(not built, reason="the extension is not built")
@pytest.mark.parametrize(("operator", "case"), [*cases()], ids=name)
def test_ours_and_every_peer_compute_the_same(operator: Operator, case: Case) -> None:
    ours = outcome(operator, case, None)
    assert ours
    for peer in operator.peers:
        if peer.takes(case, "fwd") and not peer.missing() and not peer.compiles:
            for x, expected in zip(outcome(operator, case, peer), ours, strict=True):
                error = (x.double() - expected.double()).abs().max().item()
                tolerance = max(TOLERANCE[case.dtype], TOLERANCE.get(str(x.dtype).removeprefix("torch."), 0.0))
                assert error <= tolerance * expected.double().abs().max().item(), peer.name


@pytest.mark.skipif(not built, reason="the extension is not built")
@pytest.mark.parametrize(("operator", "case"), [*cases()], ids=name)
def test_every_contestant_runs_in_every_direction(operator: Operator, case: Case) -> None:
    for direction in (d for d in operator.directions if d != "fwd"):
        for peer in (None, *(p for p in operator.peers if p.takes(case, direction) and not p.missing() and not p.compiles)):
            inputs = inputs_of(operator, case)
            call = prepared(peer.build() if peer else operator.ours, peer.prepare(inputs) if peer else inputs, direction)
            gradients = flat(call())
            assert gradients == flat(call()) if not gradients else all(map(torch.equal, gradients, flat(call())))
            assert len(gradients) >= 1 and all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize(("operator", "case"), [*cases()], ids=name)
def test_forward_reads_its_inputs_and_writes_its_results_once(operator: Operator, case: Case) -> None:
    work = operator.work(case, "fwd")
    assert work.flops > 0
    if operator.name in IN_PLACE:
        return
    inputs = inputs_of(operator, case)
    plain = next(peer for peer in operator.peers if peer.name == "plain")
    results = flat(prepared(plain.build(), plain.prepare(inputs), "fwd")())
    assert work.read == sum(x.nbytes for x in flat(inputs))
    assert work.written == sum(x.nbytes for x in results)


@pytest.mark.parametrize(("dtype", "per_value"), [("float32", 16 + 12), ("bfloat16", 16 + 12 + 2)])
def test_adamw_moves_what_it_keeps_and_the_gradient(dtype: str, per_value: int) -> None:
    work = OPERATORS["adamw_"].work(Case((3, 5, 7), dtype), "fwd")
    assert work.moved == per_value * 105


def test_causal_attention_multiplies_what_its_mask_leaves() -> None:
    length, heads, head_dim = 5, 3, 8
    case = Case((2, length, heads, 1, head_dim), "float32")
    seen = 2 * heads * sum(query + 1 for query in range(length))
    work = OPERATORS["flash_attention"].work
    assert work(case, "fwd").flops == 2 * (2 * head_dim) * seen
    assert work(case, "bwd").flops == 5 * (2 * head_dim) * seen


def test_a_backward_pass_moves_what_it_is_made_of() -> None:
    x, weight = 6 * 10 * 4, 10 * 4
    case = Case((6, 10), "float32")
    assert OPERATORS["rms_norm"].work(case, "bwd").moved == 3 * x + 2 * weight
    assert OPERATORS["add_rms_norm"].work(case, "bwd").moved == 4 * x + 2 * weight
    assert OPERATORS["swiglu"].work(case, "bwd").moved == 5 * x


def test_a_peer_that_compiles_is_measured_sparingly_unless_it_is_named() -> None:
    operator = OPERATORS["rms_norm"]
    shapes = {operator.name: tuple(operator.shapes)}

    def rows(sparing: bool) -> list[tuple[str, str, str]]:
        plan = Plan((operator,), operator.dtypes, DIRECTIONS, shapes, ("compile",), sparing=sparing)
        return [
            (label, dtype, direction)
            for _, label, dtype, direction in plan.rows("cpu")
            if plan.contestants(operator, label, Case(operator.shapes[label], dtype), direction)
        ]

    first = next(iter(operator.shapes))
    assert rows(sparing=True) == [(first, "float32", "fwd"), (first, "float32", "bwd")]
    assert len(rows(sparing=False)) == 3 * (2 * len(operator.shapes) - 1)  # decoding has no backward pass
