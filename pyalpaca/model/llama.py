"""The LLaMA forward pass: a pure function of a parameter tree.

What the tree holds decides what happens: no `embed`, and the input is hidden states; no `norm`, and the output is; LoRA
factors beside a weight, and they are added. Legend: B batch, S sequence, D model width, H heads, K kv heads, d head_dim,
F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyalpaca.model.axis import ONE_DEVICE, Axis
from pyalpaca.model.config import LlamaConfig
from pyalpaca.model.params import Tree
from pyalpaca.model.rope import Rope
from pyalpaca.ops import flash_attention, rms_norm, rope


class LayerCache(NamedTuple):
    """Keys and values of one layer so far, (B, T, K, d); `start` positions are filled."""

    k: Tensor
    v: Tensor
    start: int


def project(params: Tree, x: Tensor, config: LlamaConfig) -> Tensor:
    """x @ weight.T, plus the LoRA path x @ A.T @ B.T * scale where the tree holds one."""
    y = F.linear(x, params["weight"])
    if "lora_a" in params:
        y = y + F.linear(F.linear(x, params["lora_a"]), params["lora_b"]) * config.lora_scale
    return y


def attention(params: Tree, x_BSD: Tensor, table: Rope, config: LlamaConfig, cache: LayerCache | None = None) -> Tensor:
    """Causal self-attention over this rank's heads; with a cache, keys and values are stored in it and read from it."""
    q_BSHd, k_BSKd, v_BSKd = (project(params[name], x_BSD, config).unflatten(-1, (-1, config.head_dim)) for name in "qkv")
    q_BSHd, k_BSKd = rope(q_BSHd, *table), rope(k_BSKd, *table)
    start = 0
    if cache is not None:
        start, stop = cache.start, cache.start + x_BSD.shape[1]
        cache.k[:, start:stop], cache.v[:, start:stop] = k_BSKd, v_BSKd
        k_BSKd, v_BSKd = cache.k[:, :stop], cache.v[:, :stop]
    return project(params["o"], flash_attention(q_BSHd, k_BSKd, v_BSKd, causal=True, q_offset=start).flatten(-2), config)


def feed_forward(params: Tree, x_BSD: Tensor, config: LlamaConfig) -> Tensor:
    """SwiGLU (Shazeer 2020)."""
    return project(params["down"], F.silu(project(params["gate"], x_BSD, config)) * project(params["up"], x_BSD, config), config)


def layer(params: Tree, x_BSD: Tensor, table: Rope, config: LlamaConfig, axis: Axis, cache: LayerCache | None = None) -> Tensor:
    """One pre-norm transformer block: attention, then a gated feed-forward network, each on its own residual branch."""
    a_BSD = axis.enter(rms_norm(x_BSD, params["attention_norm"], config.norm_eps))
    x_BSD = x_BSD + axis.exit(attention(params["attention"], a_BSD, table, config, cache))
    f_BSD = axis.enter(rms_norm(x_BSD, params["ffn_norm"], config.norm_eps))
    return x_BSD + axis.exit(feed_forward(params["ffn"], f_BSD, config))


def forward(
    params: Tree,
    x: Tensor,
    config: LlamaConfig,
    axis: Axis = ONE_DEVICE,
    *,
    cache: list[LayerCache] | None = None,
    recompute: bool = False,
    last_only: bool = False,
) -> Tensor:
    """Logits (B, S, V / axis.size) from token ids (B, S); hidden states (B, S, D) in or out on a pipeline's inner stages.

    cache: one LayerCache a layer of the tree, all filled to the same position, which is where x begins.
    recompute: keep only each layer's input for the backward pass and compute the rest again.
    last_only: logits of the last position alone (B, 1, V / axis.size), all that generation needs of a prompt.
    """
    x_BSD = axis.embedding(params["embed"], x) if "embed" in params else x
    start = cache[0].start if cache else 0
    table = axis.rope_table(config, start, x_BSD.shape[1], x_BSD.device)
    for i, weights in enumerate(params["layers"].values()):
        if recompute:
            x_BSD = checkpoint(layer, weights, x_BSD, table, config, axis, use_reentrant=False)
        else:
            x_BSD = layer(weights, x_BSD, table, config, axis, cache[i] if cache else None)
    if "norm" not in params:
        return x_BSD
    if last_only:
        x_BSD = x_BSD[:, -1:]
    head_VD = params["embed"] if config.tie_embeddings else params["head"]
    return F.linear(axis.enter(rms_norm(x_BSD, params["norm"], config.norm_eps)), head_VD)
