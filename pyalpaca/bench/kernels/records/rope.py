"""Rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyalpaca.bench.kernels.operator import DECODE, Case, Function, Operator, Peer, Work, compiled, plain
from pyalpaca.ops import reference, rope

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
