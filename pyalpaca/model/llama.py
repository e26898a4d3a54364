"""The LLaMA forward pass: a pure function of a parameter tree.

What the tree holds decides what happens: no `embed`, and the input is hidden states; no `norm`, and the output is; LoRA
factors beside a weight, and they are added; a scale beside it, and the weight is of integers. Legend: B batch, S sequence,
D model width, H heads, K kv heads, d head_dim, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyalpaca.model.axis import ONE_DEVICE, Axis
from pyalpaca.model.config import LlamaConfig
from pyalpaca.model.dropout import Drop, Dropout, dropper, undropped
from pyalpaca.model.params import Tree
from pyalpaca.model.recompute import Again, Recompute, kept, recomputing
from pyalpaca.model.rope import Rope
from pyalpaca.ops import (
    add_rms_norm,
    cached_attention,
    linear,
    linear_quantized,
    rms_norm,
    rope_qk,
    rope_qk_store,
    store_cache,
    swiglu,
)


class LayerCache(NamedTuple):
    """Keys and values of one layer so far, (B, T, K, d); `start` positions are filled. Those in int8 have scales, (B, T, K).

    slots: of B x T places where those of the tokens that come belong, int64 (B, S); `forward` says so, once for all layers.
    """

    k: Tensor
    v: Tensor
    start: int
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None
    slots: Tensor | None = None


def free_slots(cache: LayerCache, length: int) -> Tensor:
    """The places behind those that are filled, for `length` tokens of each sequence."""
    batch, room = cache.k.shape[:2]
    first_B1 = torch.arange(cache.start, batch * room + cache.start, room, device=cache.k.device)[:, None]
    return first_B1 + torch.arange(length, device=cache.k.device)


def product(weights: Tree, x: Tensor) -> Tensor:
    """x @ weight.T; a weight of integers has its scales beside it."""
    if "scale" in weights:
        return linear_quantized(x, weights["weight"], weights["scale"])
    return linear(x, weights["weight"])


def project(params: Tree, module: str, x: Tensor, config: LlamaConfig, drop: Drop = undropped) -> Tensor:
    """x @ weight.T, plus the LoRA path x @ A.T @ B.T * scale where the tree holds one."""
    weights = params[module]
    y = product(weights, x)
    if "lora_a" in weights:
        dropped = drop(x, module)
        y = y + linear(linear(dropped, weights["lora_a"]), weights["lora_b"]) * config.lora_scale
    return y


def attention(
    params: Tree,
    x_BSD: Tensor,
    table: Rope,
    config: LlamaConfig,
    axis: Axis = ONE_DEVICE,
    cache: LayerCache | None = None,
    drop: Drop = undropped,
) -> Tensor:
    """Causal self-attention over this rank's heads; with a cache, keys and values are stored in it and read from it."""
    q_BSHd, k_BSKd, v_BSKd = (project(params, name, x_BSD, config, drop).unflatten(-1, (-1, config.head_dim)) for name in "qkv")
    if cache is None:
        q_BSHd, k_BSKd = rope_qk(q_BSHd, k_BSKd, *table)
        mixed_BSHd = axis.attend(q_BSHd, k_BSKd, v_BSKd)
    else:
        k, v, start, k_scales, v_scales, slots_BS = cache
        if k.dtype == k_BSKd.dtype and k.is_contiguous():  # turned and stored in one pass
            slots_BS = free_slots(cache, x_BSD.shape[1]) if slots_BS is None else slots_BS
            q_BSHd, _ = rope_qk_store(q_BSHd, k_BSKd, v_BSKd, *table, slots_BS, k, v)
        else:
            q_BSHd, k_BSKd = rope_qk(q_BSHd, k_BSKd, *table)
            store_cache(k_BSKd, k, start, scales_BTK=k_scales)
            store_cache(v_BSKd, v, start, scales_BTK=v_scales)
        length = start + x_BSD.shape[1]
        mixed_BSHd = cached_attention(q_BSHd, k, v, length, k_scales_BTK=k_scales, v_scales_BTK=v_scales)
    return project(params, "o", mixed_BSHd.flatten(-2), config, drop)


def feed_forward(params: Tree, x_BSD: Tensor, config: LlamaConfig, again: Again = kept, drop: Drop = undropped) -> Tensor:
    """SwiGLU (Shazeer 2020)."""
    gate_BSF, up_BSF = (project(params, name, x_BSD, config, drop) for name in ("gate", "up"))
    return project(params, "down", again(swiglu(gate_BSF, up_BSF), swiglu, gate_BSF, up_BSF), config, drop)


def layer(
    params: Tree,
    x_BSD: Tensor,
    table: Rope,
    config: LlamaConfig,
    axis: Axis,
    cache: LayerCache | None = None,
    again: Again = kept,
    drop: Drop = undropped,
) -> Tensor:
    """One pre-norm transformer block: attention, then a gated feed-forward network, each on its own residual branch."""

    def enter(x: Tensor, norm: Tensor) -> Tensor:
        return axis.enter(rms_norm(x, norm, config.norm_eps))

    a_BSD = again(enter(x_BSD, params["attention_norm"]), enter, x_BSD, params["attention_norm"])
    mixed_BSD = axis.exit(attention(params["attention"], a_BSD, table, config, axis, cache, drop))
    f_BSD, x_BSD = add_rms_norm(mixed_BSD, x_BSD, params["ffn_norm"], config.norm_eps)
    del a_BSD, mixed_BSD  # what autograd does not keep is gone before the wider half begins
    f_BSD = again(axis.enter(f_BSD), enter, x_BSD, params["ffn_norm"])
    return x_BSD + axis.exit(feed_forward(params["ffn"], f_BSD, config, again, drop))


def forward(
    params: Tree,
    x: Tensor,
    config: LlamaConfig,
    axis: Axis = ONE_DEVICE,
    *,
    cache: list[LayerCache] | None = None,
    recompute: Recompute = "none",
    recompute_every: int = 1,
    dropout: Dropout | None = None,
    last_only: bool = False,
    head: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Logits (B, S, V / axis.size) from token ids (B, S); hidden states (B, S, D) in or out on a pipeline's inner stages.

    cache: one LayerCache a layer of the tree, all filled to the same position, which is where x begins.
    recompute: what the backward pass computes again, see `pyalpaca.model.recompute`, in every `recompute_every`-th layer of
    the model.
    dropout: in training, of what LoRA's factors get.
    last_only: logits of the last position alone (B, 1, V / axis.size), all that generation needs of a prompt.
    head: what becomes of the last hidden states and the head's weight instead of logits, such as a loss.
    """
    x_BSD = axis.embedding(params["embed"], x) if "embed" in params else x
    start = cache[0].start if cache else 0
    table = axis.rope_table(config, start, x_BSD.shape[1], x_BSD.device)
    if cache:
        slots_BS = free_slots(cache[0], x_BSD.shape[1])
        cache = [layer_cache._replace(slots=slots_BS) for layer_cache in cache]
    for i, (name, weights) in enumerate(params["layers"].items()):
        how = recompute if int(name) % recompute_every == 0 else "none"
        block = partial(layer, weights, table=table, config=config, axis=axis, cache=cache[i] if cache else None)
        drop = partial(dropper, dropout, int(name), axis.rank) if dropout else lambda again: undropped
        if how == "full":
            x_BSD = checkpoint(block, x_BSD, drop=drop(kept), use_reentrant=False, preserve_rng_state=False)
        elif how == "selective" or dropout:  # what is dropped is made again in any case: the mask costs no memory
            with recomputing() as again:
                x_BSD = block(x_BSD, again=again if how == "selective" else kept, drop=drop(again))
        else:
            x_BSD = block(x_BSD)
    if "norm" not in params:
        return x_BSD
    if last_only:
        x_BSD = x_BSD[:, -1:]
    weight = params["embed"] if config.tie_embeddings else params["head"]
    x_BSD = axis.enter(rms_norm(x_BSD, params["norm"], config.norm_eps))
    if head is not None:
        return head(x_BSD, weight)
    return product({"weight": weight} if isinstance(weight, Tensor) else weight, x_BSD)
