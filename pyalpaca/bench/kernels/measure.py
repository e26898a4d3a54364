"""Measuring: one row for each operator, direction, dtype and shape, ours beside all peers that can be had here."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from tqdm import tqdm

from pyalpaca.bench.kernels.device import Call, Device
from pyalpaca.bench.kernels.limits import Limits
from pyalpaca.bench.kernels.operator import Case, Function, Operator, Peer, Work
from pyalpaca.bench.kernels.timing import Budget, Samples, take_turns
from pyalpaca.bench.machine import rounded
from pyalpaca.ops import reuse_memory

OURS = "ours"
_LIMIT = "limit"


@dataclass(frozen=True)
class Plan:
    """What is measured: operators, and of each the dtypes, directions, labels of shapes and names of peers that it has.

    sparing: those peers that take seconds to begin with are measured only once in each direction.
    """

    operators: tuple[Operator, ...]
    dtypes: tuple[str, ...]
    directions: tuple[str, ...]
    shapes: Mapping[str, tuple[str, ...]]
    peers: tuple[str, ...]
    budget: Budget = field(default_factory=Budget)
    sparing: bool = False

    def contestants(self, operator: Operator, label: str, case: Case, direction: str) -> list[Peer]:
        """The peers of a row."""
        first = (label, case.dtype) == (next(iter(operator.shapes)), operator.dtypes[0])
        return [
            peer
            for peer in operator.peers
            if peer.name in self.peers
            and peer.takes(case, direction)
            and not peer.missing()
            and (first or not (self.sparing and peer.compiles))
        ]

    def rows(self, device: str) -> Iterator[tuple[Operator, str, str, str]]:
        """(operator, label, dtype, direction) of each row in the table's order."""
        for operator in self.operators:
            if device in operator.devices:
                for label in self.shapes[operator.name]:
                    for dtype in (d for d in operator.dtypes if d in self.dtypes):
                        for direction in (d for d in operator.directions if d in self.directions and operator.takes(label, d)):
                            yield operator, label, dtype, direction


def measure(plan: Plan, device: Device, limits: Limits) -> list[dict[str, Any]]:
    """The rows of a plan, with a bar on stderr."""
    x = torch.ones(1, requires_grad=True)
    torch.autograd.grad(x + x, x, torch.ones(1))  # the first one loads some 35 MB of torch, which are no operator's
    rows, planned = [], list(plan.rows(device.name))
    with warnings.catch_warnings(), tqdm(planned, unit="row", disable=None, file=sys.stderr) as bar:
        warnings.simplefilter("ignore")  # what peers say about themselves, torch.compile above all
        for operator, label, dtype, direction in bar:
            name = f"{operator.name}/{direction}/{dtype}/{label}"
            bar.set_description(name)
            case = Case(operator.shapes[label], dtype, device.name)
            rows.append(_measure_row(name, plan, operator, label, case, direction, device, limits))
    return rows


def _measure_row(
    name: str, plan: Plan, operator: Operator, label: str, case: Case, direction: str, device: Device, limits: Limits
) -> dict[str, Any]:
    torch.manual_seed(0)
    with _pages_of_commands():
        inputs = operator.make(case)
    work = operator.work(case, direction)
    limit, _ = limits.bound(work)
    amount, probe = limits.ways[limit]
    calls, left_out = {_LIMIT: probe, OURS: prepared(operator.ours, inputs, direction)}, {}
    for peer in plan.contestants(operator, label, case, direction):
        try:
            with _pages_of_commands():
                peers_inputs = peer.prepare(inputs)
            call = prepared(peer.build(), peers_inputs, direction)
            if peer.compiles:
                call()
            calls[peer.name] = call
        except RuntimeError as error:  # no memory for it, no compiler, a dtype that it does not know
            left_out[peer.name] = str(error).strip().split("\n")[0]
            tqdm.write(f"{name}: {peer.name} is left out, it fails with {left_out[peer.name]}", file=sys.stderr)
    found = take_turns(calls, device, plan.budget)
    least = (work.flops if limit == limits.compute else work.moved) / (amount / found.pop(_LIMIT).seconds)
    return row(name, work, limit, least, found) | ({"left_out": left_out} if left_out else {})


@contextmanager
def _pages_of_commands() -> Iterator[None]:
    """Large tensors made here lie on huge pages, as the weights and caches of training and generation do; what the timed calls
    make has the memory of a program that did not ask for them."""
    reuse_memory()
    try:
        yield
    finally:
        reuse_memory(on=False)


def prepared(function: Function, inputs: Sequence[Any], direction: str) -> Call:
    """The call that is timed: forward without gradients, backward of a result that is kept, or both."""
    if direction == "fwd":
        return _forward(function, inputs)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if direction == "both":
        return lambda: torch.autograd.grad(*_first_and_gradient(function(*inputs), leaves))
    # A compiled function gives up what it has kept at the first backward unless it is told not to.
    with functorch_config.patch(donated_buffer=False):  # type: ignore[attr-defined]
        out, _, gradient = _first_and_gradient(function(*inputs), leaves)
    return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)


def _first_and_gradient(result: Any, leaves: list[Tensor]) -> tuple[Any, list[Tensor], Any]:
    """What autograd.grad wants: the results that have a gradient, the leaves, gradients of those results (ones)."""
    results = [x for x in (result if isinstance(result, tuple) else (result,)) if x.requires_grad]
    return results, leaves, [torch.ones_like(x) for x in results]


def _forward(function: Function, inputs: Sequence[Any]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return function(*inputs)

    return call


def row(name: str, work: Work, limit: str, least: float, found: Mapping[str, Samples]) -> dict[str, Any]:
    """A row in the shape of docs/architecture.md, "The last line". least: the seconds that the work takes at the limit."""
    ours = found[OURS]
    peers = {peer: samples for peer, samples in found.items() if peer != OURS}
    cold = ours.cold_seconds
    return {
        "name": name,
        **_summary(ours),
        "flops": work.flops,
        "bytes": work.moved,
        "flops_per_second": rounded(work.flops / ours.seconds),
        "bytes_per_second": rounded(work.moved / ours.seconds),
        "limit": limit,
        "limit_seconds": rounded(least),
        "limit_share": round(least / ours.seconds, 3),
        "cold_limit_share": None if cold is None else round(least / cold, 3),
        "vs": {peer: rounded(samples.seconds / ours.seconds) for peer, samples in peers.items()},
        "vs_cold": {
            peer: rounded(other / cold)
            for peer, other in ((peer, samples.cold_seconds) for peer, samples in peers.items())
            if other is not None and cold is not None
        },
        "peers": {peer: _summary(samples) for peer, samples in peers.items()},
    }


def _summary(samples: Samples) -> dict[str, Any]:
    cold = samples.cold_seconds
    return {
        "seconds": rounded(samples.seconds),
        "cold_seconds": None if cold is None else rounded(cold),
        "spread": round(samples.spread, 3),
        "calls": len(samples.warm),
        "page_faults": round(sorted(samples.faults)[len(samples.faults) // 2]),
        "peak_bytes": samples.peak,
        "result_bytes": samples.result,
    }


def skipped(operators: Sequence[Operator], names: Sequence[str], device: str) -> list[tuple[Peer, list[str]]]:
    """(peer, modules that are not installed) of the peers that would be measured if they were."""
    found: dict[str, tuple[Peer, list[str]]] = {}
    for operator in operators:
        for peer in operator.peers:
            if peer.name in names and device in peer.devices and peer.missing():
                found.setdefault(peer.name, (peer, peer.missing()))
    return list(found.values())
