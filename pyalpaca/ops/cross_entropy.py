"""A model's head and its cross entropy in one: the logits of some hundred tokens at a time, never those of all.

The gradients are made in the forward pass, while a chunk's logits are at hand: three products in all, as many as with the
logits kept whole. Made in the backward pass they would take a fourth, the logits once more, which is a third of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_variadic

from pyalpaca.ops.operators import linear, linear_dweight_add_, linear_dx

CHUNK = 378  # tokens: as many as a product on CPU works at together
LEAST, MOST_BYTES = 64, 96 << 20  # for wide vocabularies fewer, so that a chunk's logits take no more


def chunk_tokens(tokens: int, vocabulary: int) -> int:
    """How many of so many tokens have their logits, fp32, at once; vocabulary: the rows of the head."""
    return min(tokens, CHUNK, max(LEAST, MOST_BYTES // (4 * max(vocabulary, 1))))


def _alone(x: Tensor) -> Tensor:
    return x


class Shards(NamedTuple):
    """How ranks that hold parts of the vocabulary agree: where this one's begins, the maximum and sum over all of them, and the
    most rows that one of them holds, from which all know how many tokens a chunk has."""

    start: int = 0
    maximum: Callable[[Tensor], Tensor] = _alone
    total: Callable[[Tensor], Tensor] = _alone
    rows: int = 0


WHOLE = Shards()


def linear_cross_entropy(
    x: Tensor, weight_VD: Tensor, labels: Tensor, scale: float | Tensor = 1.0, shards: Shards = WHOLE
) -> Tensor:
    """scale x the sum of the negative log-likelihoods of `labels` under the logits x weight^T, without holding these logits.

    x (..., D), weight (V, D) of the same dtype, labels int64 (...), -100 where no loss is taken; scale: a number or a scalar
    without gradient -> fp32 scalar. Differentiable in x and weight, by one backward pass. With `shards`, weight is this rank's
    rows and labels are those of the whole vocabulary; every rank gets the loss, its own rows' gradient, and its summand of that
    of x.
    ValueError for labels of another shape, or, where the vocabulary is whole, outside of it.
    """
    if has_torch_function_variadic(x, weight_VD):
        return handle_torch_function(linear_cross_entropy, (x, weight_VD), x, weight_VD, labels, scale, shards)
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: labels have shape {tuple(labels.shape)}, expected that of x but its last dimension, "
            f"{tuple(x.shape[:-1])}"
        )
    if shards is WHOLE and labels.device.type == "cpu" and labels.numel():
        known = ((labels >= 0) & (labels < weight_VD.shape[0])) | (labels == -100)
        if not known.all():
            raise ValueError(
                f"linear_cross_entropy: found the label {int(labels[~known][0])}, expected 0 to {weight_VD.shape[0] - 1}, or -100"
            )
    if not torch.is_grad_enabled():  # a Function is told only that its inputs ask for a gradient
        x, weight_VD = x.detach(), weight_VD.detach()
    loss: Tensor = _Loss.apply(x.reshape(-1, x.shape[-1]), weight_VD, labels.reshape(-1), scale, shards)
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale: float | Tensor, shards: Shards) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=x_TD.device)
        dx_TD = torch.zeros_like(x_TD) if ctx.needs_input_grad[0] else None
        # Summed over chunks in fp32, whatever the weight's dtype is.
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        step = chunk_tokens(len(x_TD), shards.rows or len(weight_VD))
        for first in range(0, len(x_TD), max(step, 1)):
            rows = slice(first, first + step)
            x, labels = x_TD[rows], labels_T[rows]
            losses, gradient = _chunk(x, weight_VD, labels, scale, shards, gradient=any(ctx.needs_input_grad))
            total += losses.double().sum()
            if dx_TD is not None:
                dx_TD[rows] = linear_dx(gradient, weight_VD)
            if dweight_VD is not None:
                linear_dweight_add_(dweight_VD, gradient, x)
            del gradient  # before the next one is made
        ctx.found = dx_TD, None if dweight_VD is None else dweight_VD.to(weight_VD.dtype)
        return (total * scale).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.found is None:
            raise RuntimeError("linear_cross_entropy: found a second backward pass, expected one; run the forward pass again")
        # Nothing here holds on to them, so that autograd may take the gradient of a leaf as it is instead of copying it.
        (dx_TD, dweight_VD), ctx.found = ctx.found, None
        # The gradient of a loss by itself is 1, and a pass over the head's gradient would be for nothing.
        if grads[0].device.type == "cpu" and grads[0].item() == 1.0:
            return dx_TD, dweight_VD, None, None, None
        dx_TD, dweight_VD = (g if g is None else (g * grads[0]).to(g.dtype) for g in (dx_TD, dweight_VD))
        return dx_TD, dweight_VD, None, None, None


def _chunk(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale: float | Tensor, shards: Shards, gradient: bool
) -> tuple[Tensor, Tensor]:
    """The losses fp32 (T), and the gradient of scale x their sum by this rank's logits (T, V) in the dtype of x."""
    logits_TV = linear(x_TD, weight_VD).float()
    top_T1 = shards.maximum(logits_TV.amax(-1, keepdim=True))
    counted_T = labels_T != -100
    local_T = labels_T - shards.start
    mine_T = (local_T >= 0) & (local_T < logits_TV.shape[1])
    index_T1 = local_T.where(mine_T, 0).unsqueeze(-1)
    target_T = logits_TV.gather(-1, index_T1).squeeze(-1).where(mine_T, 0.0)
    weights_TV = logits_TV.sub_(top_T1).exp_()
    sums_T, target_T = shards.total(torch.stack((weights_TV.sum(-1), target_T)))
    losses_T = (sums_T.log() + top_T1.squeeze(-1) - target_T).where(counted_T, 0.0)
    if not gradient:
        return losses_T, weights_TV
    share_T = counted_T * scale
    weights_TV.mul_((share_T / sums_T).unsqueeze(-1))
    weights_TV.scatter_add_(-1, index_T1, -(share_T * mine_T).to(weights_TV.dtype).unsqueeze(-1))
    return losses_T, weights_TV.to(x_TD.dtype)
