"""All that the model knows of parallelism: a small record of functions, the identity on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


def identity(x: Tensor) -> Tensor:
    return x


def cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Per-token negative log-likelihood, fp32 (B, S); 0 where the label is -100."""
    loss = F.cross_entropy(logits_BSV.float().flatten(0, -2), labels_BS.flatten(), ignore_index=-100, reduction="none")
    return loss.view(labels_BS.shape)


def embedding(weight_VD: Tensor, tokens_BS: Tensor) -> Tensor:
    return F.embedding(tokens_BS, weight_VD)


@dataclass(frozen=True)
class Axis:
    """What tensor parallelism adds to the forward pass; `pyalpaca.parallel` makes one from a process group.

    enter: before a projection cut by output (identity forward, sum of gradients backward).
    exit: after a projection cut by input (sum forward, identity backward).
    embedding: look-up in this rank's rows of the embedding, summed over ranks.
    cross_entropy: per-token loss from this rank's columns of the logits.
    gather_logits: this rank's columns -> all columns, for sampling; no gradient.
    """

    rank: int = 0
    size: int = 1
    enter: Callable[[Tensor], Tensor] = identity
    exit: Callable[[Tensor], Tensor] = identity
    embedding: Callable[[Tensor, Tensor], Tensor] = embedding
    cross_entropy: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    gather_logits: Callable[[Tensor], Tensor] = identity


ONE_DEVICE = Axis()
