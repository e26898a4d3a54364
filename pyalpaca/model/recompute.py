"""Activations that the backward pass computes again instead of keeping them from the forward pass.

full: only a block's input is kept (Chen et al. 2016), and its forward pass is run again.
selective: outputs of matrix products and of attention are kept, and what is cheap to make of them is not: the normalised
inputs of both halves of a block, and silu(gate) * up. Of the 8 D + 3 F numbers that a block keeps for each token (with as many
key/value heads as heads), 2 D + F are let go, and no matrix product is done twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Recompute = Literal["none", "selective", "full"]


class Again(Protocol):
    """again(y, recipe, *inputs) -> y, of which is known that recipe(*inputs) makes it again, bit by bit."""

    def __call__(self, y: Tensor, recipe: Callable[..., Tensor], *inputs: Tensor) -> Tensor: ...


def kept(y: Tensor, recipe: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The Again that lets autograd keep y."""
    return y


class _Recipe:
    """How to make a tensor again; the value lives from the first use in the backward pass to the last."""

    def __init__(self, y: Tensor, recipe: Callable[..., Tensor], inputs: Sequence[Tensor | _Recipe]) -> None:
        self.made, self.shape = weakref.ref(y), y.shape
        self._recipe, self._inputs = recipe, inputs
        self.uses = self._left = 0
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        if self._value is None:
            with torch.no_grad():
                inputs = (x.value().view(x.shape) if isinstance(x, _Recipe) else x for x in self._inputs)
                self._value, self._left = self._recipe(*inputs), self.uses
        value, self._left = self._value, self._left - 1
        if not self._left:
            self._value = None
        return value


@contextmanager
def recomputing() -> Iterator[Again]:
    """Within it autograd keeps no tensor that was given to the Again, as long as the caller holds on to that tensor."""
    recipes: dict[int, _Recipe] = {}

    def find(x: Tensor) -> _Recipe | None:
        """The recipe of x, or of what x is a view of: F.linear flattens its input."""
        found = recipes.get(x.data_ptr())  # while the tensor made lives, no other one can begin where it does
        if found is None or found.made() is None or x.numel() != found.shape.numel() or not x.is_contiguous():
            return None
        found.uses += 1
        return found

    def again(y: Tensor, recipe: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        recipes[y.data_ptr()] = _Recipe(y, recipe, [find(x) or x for x in inputs])
        return y

    def pack(x: Tensor) -> Any:
        found = find(x)
        return x if found is None else (found, x.shape)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].value().view(packed[1])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield again
