"""Weight gradients put off: the half of a linear layer's backward pass that no other stage waits for (Qi et al. 2023).

The choice lies in the tree: a leaf that `Deferred.wrap` has wrapped behaves as the leaf itself, only that `linear` with it
gives the gradient of its input in the backward pass, and notes down what the gradient of the weight takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyalpaca.model import Tree, tree_map
from pyalpaca.ops import linear, linear_dweight, linear_dx

Note = tuple[Tensor, Tensor, Tensor]  # leaf, input, gradient of the output


class _Linear(torch.autograd.Function):
    """`linear` whose backward gives the input's gradient and notes the rest.

    The leaf itself takes no part in the graph, so no hook of it is called twice; the anchor keeps the layer in it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, box: tuple[Tensor], notes: list[Note]) -> Tensor:
        ctx.save_for_backward(x)
        (ctx.leaf,), ctx.notes = box, notes
        return linear(x, ctx.leaf)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.notes.append((ctx.leaf, x.detach(), grads[0]))
        return linear_dx(grads[0], ctx.leaf) if ctx.needs_input_grad[0] else None, None, None, None


class _Weight(Tensor):
    """Stands for a leaf: `linear` puts its gradient off, everything else sees the leaf."""

    leaf: Tensor
    deferred: Deferred

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is linear and len(args) == 2 and not kwargs and isinstance(args[1], _Weight):
            x, weight = args
            return weight.deferred.linear(_plain(x), weight.leaf)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*map(_plain, args), **{key: _plain(value) for key, value in (kwargs or {}).items()})


def _plain(value: Any) -> Any:
    if isinstance(value, _Weight):
        return value.leaf
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


class Deferred:
    """The notes of one step's backward passes. anchor: a scalar to be among the inputs that a backward pass is asked for."""

    def __init__(self) -> None:
        self.anchor = torch.zeros((), requires_grad=True)
        self._notes: list[Note] = []

    def linear(self, x: Tensor, leaf: Tensor) -> Tensor:
        """x @ leaf.T; in the backward pass what the gradient of `leaf` takes is noted."""
        # In a box, since autograd takes every tensor among the arguments for one that wants its gradient from here.
        y: Tensor = _Linear.apply(x, self.anchor, (leaf,), self._notes)
        return y

    def wrap(self, tree: Tree) -> Tree:
        """The tree with every leaf that learns wrapped."""

        def wrap(leaf: Tensor) -> Tensor:
            if not leaf.requires_grad:
                return leaf
            # An alias of the leaf, not a copy: where it is taken as it is, the gradient flows to the leaf at once.
            weight = leaf.as_subclass(_Weight)
            weight.leaf, weight.deferred = leaf, self
            return weight

        return tree_map(wrap, tree)

    def take(self) -> list[Note]:
        """What has been noted since the last call, for `give` to work off."""
        notes = self._notes.copy()
        self._notes.clear()
        return notes


def give(notes: Sequence[Note]) -> None:
    """Work notes off: each leaf gets its gradient, added to its `grad` by autograd, so that hooks see it."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for leaf, x, grad in notes:
        # The product as autograd itself forms it, so that not one bit differs.
        part = linear_dweight(grad, x)
        found[id(leaf)] = leaf, found[id(leaf)][1] + part if id(leaf) in found else part
    for leaf, total in found.values():
        torch.autograd.backward(leaf, total)
