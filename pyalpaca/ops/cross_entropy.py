"""A model's head and its cross entropy in one: the logits of some hundred tokens at a time, never those of all.

The gradients are made in the forward pass, while a chunk's logits are at hand: three products in all, as many as with the
logits kept whole. Made in the backward pass they would take a fourth, the logits once more, which is a third of the time.
A chunk's logits become their own gradient in place. The head's gradient is summed over the chunks in fp32; where it is of a
half type its memory holds one half of that sum until the last chunk, so that only the other half is kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_variadic

from pyalpaca.ops.operators import (
    linear,
    linear_dweight,
    linear_dweight_add_,
    linear_dweight_add_split_,
    linear_dweight_split,
    linear_dx,
    logit_loss_,
    logit_sums,
)

BLOCK, MOST_BLOCKS = 378, 2  # tokens that a product on CPU works at together, and how many times that a chunk may have
IGNORED = -100  # the label of a token without loss
LEAST, MOST_BYTES = 64, 100 << 20  # for wide vocabularies fewer, so that a chunk's logits take no more


def chunk_tokens(tokens: int, vocabulary: int, element: int) -> int:
    """How many of so many tokens have their logits at once; vocabulary: the rows of the head; element: bytes of a logit."""
    most = max(LEAST, min(MOST_BYTES // (element * max(vocabulary, 1)), MOST_BLOCKS * BLOCK))
    return tokens if tokens <= most else max(most // BLOCK * BLOCK, min(most, BLOCK))


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
    if shards is WHOLE and labels.device.type == "cpu":
        _check_labels(labels, weight_VD.shape[0])
    if not torch.is_grad_enabled():  # a Function is told only that its inputs ask for a gradient
        x, weight_VD = x.detach(), weight_VD.detach()
    loss: Tensor = _Loss.apply(x.reshape(-1, x.shape[-1]), weight_VD, labels.reshape(-1), scale, shards)
    return loss


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    if labels.numel() == 0:
        return
    least, most = labels.aminmax()
    if int(least) >= 0 and int(most) < vocabulary:
        return
    known = ((labels >= 0) & (labels < vocabulary)) | (labels == IGNORED)
    if not known.all():
        raise ValueError(
            f"linear_cross_entropy: found the label {int(labels[~known][0])}, expected 0 to {vocabulary - 1}, or {IGNORED}"
        )


Held = tuple[Tensor | None, Tensor | None]
"""The gradient of the head so far: what is returned of it in the end, and of a half type the lower halves of its fp32 numbers."""


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, scale: float | Tensor, shards: Shards) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        step = max(chunk_tokens(len(x_TD), shards.rows or len(weight_VD), x_TD.element_size()), 1)
        chunks = list(zip(x_TD.split(step), labels_T.split(step), strict=True))
        wide = torch.promote_types(x_TD.dtype, weight_VD.dtype)
        losses: list[Tensor] = []
        dxs: list[Tensor] = []
        dweight: Held = None, None
        for x, labels in chunks:
            loss_T, gradient = _chunk(x, weight_VD, labels, scale, shards, gradient=needs_x or needs_weight)
            losses.append(loss_T.sum(dtype=torch.float64))
            if needs_x:
                dxs.append(linear_dx(gradient, weight_VD))
            if needs_weight:
                last = len(losses) == len(chunks)
                dweight = _add_dweight(dweight, gradient.to(wide), x.to(wide), last)
            del gradient  # before the next one is made
        dweight_VD, dweight = dweight[0], (None, None)
        ctx.found = (
            (dxs[0] if len(dxs) == 1 else torch.cat(dxs)) if needs_x else None,
            None if dweight_VD is None else dweight_VD.to(weight_VD.dtype),
        )
        return (sum(losses[1:], losses[0]) * scale).float()

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
    logits_TV = linear(x_TD, weight_VD)
    sums_3T = logit_sums(logits_TV, labels_T, shards.start)
    if shards is not WHOLE:
        here_T, total_T, target_T = sums_3T
        top_T = shards.maximum(here_T.clone())
        sums_3T = torch.cat((top_T[None], shards.total(torch.stack((total_T * (here_T - top_T).exp(), target_T)))))
    return logit_loss_(logits_TV, labels_T, shards.start, sums_3T, scale, gradient), logits_TV


def _add_dweight(held: Held, dy_TV: Tensor, x_TD: Tensor, last: bool) -> Held:
    """With another chunk of tokens."""
    total_VD, lower_VD = held
    if total_VD is None:
        narrow = x_TD.dtype in (torch.bfloat16, torch.float16)
        return linear_dweight_split(dy_TV, x_TD) if narrow and not last else (linear_dweight(dy_TV, x_TD), None)
    if lower_VD is None:
        linear_dweight_add_(total_VD, dy_TV, x_TD)
    else:
        linear_dweight_add_split_(total_VD, lower_VD, dy_TV, x_TD, last)
    return held
