"""All that the model knows of parallelism: a small record of functions, the plain ones on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalpaca.model.config import LlamaConfig
from pyalpaca.model.rope import Rope, rope_table
from pyalpaca.ops import flash_attention, linear_cross_entropy


def identity(x: Tensor) -> Tensor:
    return x


def embedding(weight_VD: Tensor, tokens_BS: Tensor) -> Tensor:
    return F.embedding(tokens_BS, weight_VD)


@dataclass(frozen=True)
class Axis:
    """What parallelism adds to the forward pass; `pyalpaca.parallel` makes one from a mesh.

    The residual stream between blocks is whole on every rank, or, with sequence parallelism, cut in `pieces` along the
    sequence, zeros filling the last one up.
    enter: before a projection cut by output. Whole stream: identity forward, sum of gradients backward; cut: the pieces
    gathered forward, the summed gradient's piece backward.
    exit: after a projection cut by input. Whole stream: sum forward, identity backward; cut: the sum's piece, gathered.
    embedding: look-up in this rank's rows of the embedding, summed over ranks; cut like the stream.
    head_loss: scale x the sum of the losses, fp32 scalar, from hidden states (B, S or more, filled up, D), this rank's rows
    of the head and labels (B, S), without holding the logits.
    gather_logits: this rank's columns -> all columns, for sampling; no gradient.
    rope_table: cos and sin of what attention sees, from its start and the length of the stream on this rank.
    attend: causal attention of queries (B, S, H, d) to keys and values (B, S, K, d) of the same positions, without a cache.
    """

    rank: int = 0
    size: int = 1
    pieces: int = 1
    enter: Callable[[Tensor], Tensor] = identity
    exit: Callable[[Tensor], Tensor] = identity
    embedding: Callable[[Tensor, Tensor], Tensor] = embedding
    head_loss: Callable[[Tensor, Tensor, Tensor, float | Tensor], Tensor] = linear_cross_entropy
    gather_logits: Callable[[Tensor], Tensor] = identity
    rope_table: Callable[[LlamaConfig, int, int, torch.device], Rope] = rope_table
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = flash_attention

    def length(self, tokens: int) -> int:
        """The length of the residual stream on this rank, of so many tokens."""
        return -(-tokens // self.pieces)


ONE_DEVICE = Axis()
