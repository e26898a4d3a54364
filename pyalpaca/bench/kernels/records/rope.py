"""Rotary position embedding."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyalpaca.bench.kernels.operator import DECODE, Case, Function, Operator, Peer, Work, compiled, plain
from pyalpaca.ops import reference, rope, rope_qk, rope_qk_store

SHAPES = {
    "llama7b/2048": (1, 2048, 32, 128),
    "llama13b/2048": (1, 2048, 40, 128),
    "llama7b/decode": (1, 1, 32, 128),
    "small/64": (2, 64, 4, 64),
}


def angles(case: Case, length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin fp32 (length, head_dim / 2) of some angles."""
    angle_Sr = case.random(length, head_dim // 2, dtype=torch.float32, grad=False)
    return angle_Sr.cos(), angle_Sr.sin()


def doubled(inputs: list[Any]) -> list[Any]:
    """cos and sin, the last two inputs, as transformers and torch_npu want them: (1, S, d) in the dtype of x, halves alike."""
    *x, cos, sin = inputs
    return [*x, *(torch.cat((angle, angle), dim=-1)[None].to(x[0].dtype) for angle in (cos, sin))]


def _make(case: Case) -> list[Any]:
    _, length, _, head_dim = case.sizes
    return [case.random(*case.sizes), *angles(case, length, head_dim)]


def _work(case: Case, direction: str) -> Work:
    batch, length, heads, head_dim = case.sizes
    values = batch * length * heads * head_dim
    return Work(3 * values, values * case.item + 4 * length * head_dim, values * case.item)


def _transformers() -> Function:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    # It turns q and k; a k without heads leaves the work of one.
    return lambda x, cos, sin: apply_rotary_pos_emb(x, x[:, :, :0], cos, sin, unsqueeze_dim=2)[0]


def _torch_npu() -> Function:
    import torch_npu

    return lambda x, cos, sin: torch_npu.npu_rotary_mul(x, cos.unsqueeze(2), sin.unsqueeze(2), rotary_mode="half")


ROPE = Operator(
    "rope",
    axes="batch x length x heads x head_dim",
    formula="x is read and y written, backward dy and dx, and the angles read, once each; 3 flops a value",
    shapes=SHAPES,
    make=_make,
    ours=rope,
    work=_work,
    peers=(
        plain(reference.rope),
        compiled(reference.rope),
        Peer("transformers", _transformers, doubled, needs=("transformers",)),
        Peer("torch_npu", _torch_npu, doubled, needs=("torch_npu",), devices=("npu",)),
    ),
    forward_only=DECODE,
)

QKV_SHAPES = {
    "llama7b/2048": (1, 2048, 32, 32, 128),
    "llama13b/2048": (1, 2048, 40, 40, 128),
    "grouped/2048": (1, 2048, 32, 8, 128),
    "llama7b/decode": (1, 1, 32, 32, 128),
    "small/64": (2, 64, 4, 2, 64),
}


def _make_qk(case: Case) -> list[Any]:
    """q and k as slices of one fused projection."""
    batch, length, heads, kv_heads, head_dim = case.sizes
    fused = case.random(batch, length, heads + kv_heads, head_dim, grad=False)
    q, k = fused.split([heads, kv_heads], dim=2)
    return [q.requires_grad_(), k.requires_grad_(), *angles(case, length, head_dim)]


def _work_qk(case: Case, direction: str) -> Work:
    batch, length, heads, kv_heads, head_dim = case.sizes
    return _work(replace(case, sizes=(batch, length, heads + kv_heads, head_dim)), direction)


def _transformers_qk() -> Function:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return partial(apply_rotary_pos_emb, unsqueeze_dim=2)


def _plain_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return reference.rope_qk(q, k, cos, sin, None)


ROPE_QK = Operator(
    "rope_qk",
    axes="batch x length x heads x kv heads x head_dim",
    formula="as rope, for q and k, which are slices of one tensor",
    shapes=QKV_SHAPES,
    make=_make_qk,
    ours=rope_qk,
    on_request=frozenset({"grouped/2048"}),
    work=_work_qk,
    peers=(
        plain(_plain_qk),
        compiled(_plain_qk),
        Peer("transformers", _transformers_qk, doubled, needs=("transformers",)),
    ),
    devices=("cpu",),
    forward_only=DECODE,
)


def _make_store(case: Case) -> list[Any]:
    """q, k and v as slices of one fused projection, and caches of four times the length, filled from a place in the middle."""
    batch, length, heads, kv_heads, head_dim = case.sizes
    fused = case.random(batch, length, heads + 2 * kv_heads, head_dim, grad=False)
    caches = [case.random(batch, 4 * length, kv_heads, head_dim, grad=False) for _ in range(2)]
    slots_BS = length + torch.arange(length) + 4 * length * torch.arange(batch)[:, None]
    tokens = fused.split([heads, kv_heads, kv_heads], dim=2)
    return [*tokens, *angles(case, length, head_dim), slots_BS.to(case.device), *caches]


def _work_store(case: Case, direction: str) -> Work:
    batch, length, _, kv_heads, head_dim = case.sizes
    rows = batch * length * kv_heads * head_dim * case.item
    return _work_qk(case, direction) + Work(0, rows + 8 * batch * length, 2 * rows)


def _plain_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots_BS: Tensor, k_cache: Tensor, v_cache: Tensor
) -> tuple[Tensor, Tensor]:
    return reference.rope_qk_store(q, k, v, cos, sin, None, slots_BS, k_cache, v_cache)


ROPE_QK_STORE = Operator(
    "rope_qk_store",
    axes="batch x length x heads x kv heads x head_dim",
    formula="as rope_qk; v is read too, and k and v are written into their caches",
    shapes=QKV_SHAPES,
    make=_make_store,
    ours=rope_qk_store,
    on_request=frozenset({"llama13b/2048", "grouped/2048"}),
    work=_work_store,
    peers=(plain(_plain_store),),
    directions=("fwd",),
    devices=("cpu",),
)
