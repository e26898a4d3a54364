"""What the benchmark knows of an operator: a record of its shapes, inputs, work, and of those who do the same elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
DIRECTIONS = ("fwd", "bwd", "both")
"""Forward without gradients, backward alone, and a forward that keeps what its backward needs with that backward."""

DECODE = frozenset({"llama7b/decode"})
FLOATS = ("float32", "bfloat16", "float16")
ITEM_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Case:
    """One shape in one dtype. sizes: as the operator's `axes` name them; dtype: that of what the operator is named after."""

    sizes: tuple[int, ...]
    dtype: str
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def item(self) -> float:
        """Bytes of one value, half a byte for int4."""
        return ITEM_BYTES[self.dtype]

    def random(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
        """Normal numbers of the case's dtype and device, which ask for a gradient unless told otherwise."""
        x = torch.randn(shape, dtype=torch.float32).to(self.device, dtype or self.torch_dtype)
        return x.requires_grad_(grad)


@dataclass(frozen=True)
class Work:
    """What one call can't do without: floating-point operations, bytes read and bytes written of main memory."""

    flops: float
    read: float
    written: float

    @property
    def moved(self) -> float:
        return self.read + self.written

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.read + other.read, self.written + other.written)


@dataclass(frozen=True)
class Peer:
    """Someone else's function for the same inputs.

    build: imports what it needs and returns the function. prepare: the inputs in the layout that the peer likes best, not timed.
    needs: modules without which it is left out. compiles: its first call takes seconds for other reasons than the work; unless it
    is asked for by name, it is measured in the first dtype and shape of an operator alone. suits: whether it knows a case at all.
    """

    name: str
    build: Callable[[], Function]
    prepare: Callable[[list[Any]], list[Any]] = list
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "npu")
    dtypes: tuple[str, ...] | None = None
    directions: tuple[str, ...] = DIRECTIONS
    compiles: bool = False
    suits: Callable[[Case], bool] = lambda case: True

    def missing(self) -> list[str]:
        """Modules that are not installed."""
        return [name for name in self.needs if find_spec(name) is None]

    def takes(self, case: Case, direction: str) -> bool:
        """Whether it can be measured there at all."""
        known = self.dtypes is None or case.dtype in self.dtypes
        return known and case.device in self.devices and direction in self.directions and self.suits(case)


@dataclass(frozen=True)
class Operator:
    """One operator of the house.

    axes: what the numbers of a shape are, `tokens x width`. formula: the flops and bytes of `work`, in words, for the page.
    make: the inputs of a case; the backward pass gives the gradients of those that ask for one. work: of a case, by direction.
    on_request: shapes measured only when they are named. forward_only: those that nobody trains with. devices: where it runs.
    """

    name: str
    axes: str
    formula: str
    shapes: Mapping[str, tuple[int, ...]]
    make: Callable[[Case], list[Any]]
    ours: Function
    work: Callable[[Case, str], Work]
    peers: Sequence[Peer] = ()
    dtypes: tuple[str, ...] = FLOATS
    directions: tuple[str, ...] = ("fwd", "bwd")
    on_request: frozenset[str] = field(default_factory=frozenset)
    forward_only: frozenset[str] = field(default_factory=frozenset)
    devices: tuple[str, ...] = ("cpu", "npu")

    def takes(self, label: str, direction: str) -> bool:
        """Whether a shape is measured in a direction."""
        return direction in self.directions and (direction == "fwd" or label not in self.forward_only)


def plain(function: Function) -> Peer:
    """The formula in plain torch, the one that the tests take in float64 for their oracle."""
    return Peer("plain", lambda: function)


def compiled(function: Function, **limits: Any) -> Peer:
    """The same formula through torch.compile, for this very shape."""

    def build() -> Function:
        torch.compiler.reset()  # each shape a first one: none is left to run uncompiled because there were too many
        return torch.compile(function, dynamic=False, fullgraph=True)

    return Peer("compile", build, compiles=True, devices=("cpu",), **limits)


def relaid(x: Tensor, layout: Callable[[Tensor], Tensor]) -> Tensor:
    """A leaf with the values of `layout(x)` that asks for a gradient if x does."""
    return layout(x.detach()).contiguous().requires_grad_(x.requires_grad)
