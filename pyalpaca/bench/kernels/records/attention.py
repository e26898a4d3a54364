"""Attention: causal over whole sequences."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalpaca.bench.kernels.operator import Case, Function, Operator, Peer, Work, compiled, plain, relaid
from pyalpaca.ops import flash_attention, reference

SHAPES = {
    "llama7b/512": (1, 512, 32, 32, 128),
    "llama7b/1024": (1, 1024, 32, 32, 128),
    "llama7b/2048": (1, 2048, 32, 32, 128),
    "llama13b/1024": (1, 1024, 40, 40, 128),
    "grouped/1024": (1, 1024, 32, 8, 128),
    "small/64": (2, 64, 4, 4, 64),
}


def _make(case: Case) -> list[Any]:
    batch, length, heads, kv_heads, head_dim = case.sizes
    return [case.random(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads)]


def _work(case: Case, direction: str) -> Work:
    batch, length, heads, kv_heads, head_dim = case.sizes
    # A query sees (length + 1) / 2 keys on average; each takes a product of 2 head_dim flops for the score, one for the sum.
    product = 2.0 * batch * heads * head_dim * length * (length + 1) / 2
    q, kv = (batch * length * n * head_dim * case.item for n in (heads, kv_heads))
    lse = 4.0 * batch * length * heads
    if direction == "fwd":
        return Work(2 * product, q + 2 * kv, q)
    return Work(5 * product, 3 * q + 2 * kv + lse, q + 2 * kv)


def _plain(q_BSHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor) -> Tensor:
    return reference.flash_attention(q_BSHd, k_BSKd, v_BSKd, True, 0, q_BSHd.shape[-1] ** -0.5)[0]


def heads_first(inputs: list[Any]) -> list[Any]:
    """q, k and v as SDPA likes them best: (B, H, S, d) in memory."""
    return [relaid(x, lambda x: x.transpose(1, 2)) for x in inputs]


def _sdpa(q_BHSd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor) -> Tensor:
    grouped = q_BHSd.shape[1] != k_BKSd.shape[1]
    return F.scaled_dot_product_attention(q_BHSd, k_BKSd, v_BKSd, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def transformers_attention() -> Function:
    """The eager attention of transformers' LLaMA on (B, H, S, d), with a mask that is added to the scores or none."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    def attention(q_BHSd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, mask: Tensor | None = None) -> Any:
        layer: Any = SimpleNamespace(num_key_value_groups=q_BHSd.shape[1] // k_BKTd.shape[1], training=False)
        return eager_attention_forward(layer, q_BHSd, k_BKTd, v_BKTd, mask, q_BHSd.shape[-1] ** -0.5)[0]

    return attention


def _with_added_mask(inputs: list[Any]) -> list[Any]:
    length = inputs[0].shape[1]
    mask = torch.full((length, length), float("-inf"), dtype=inputs[0].dtype, device=inputs[0].device).triu(1)
    return [*heads_first(inputs), mask]


def _torch_npu() -> Function:
    import torch_npu

    def attention(q_BSHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, mask: Tensor) -> Any:
        options: dict[str, Any] = {"scale": q_BSHd.shape[-1] ** -0.5, "atten_mask": mask, "sparse_mode": 2}
        return torch_npu.npu_fusion_attention(q_BSHd, k_BSKd, v_BSKd, q_BSHd.shape[2], "BSND", **options)[0]

    return attention


def _with_mask(inputs: list[Any]) -> list[Any]:
    """The mask that sparse_mode 2 wants, whatever the length."""
    return [*inputs, torch.ones(2048, 2048, dtype=torch.bool, device=inputs[0].device).triu(1)]


FLASH_ATTENTION = Operator(
    "flash_attention",
    axes="batch x length x heads x kv heads x head_dim",
    formula="causal, so (S + 1) / 2 keys a query; 2 products of 2 d flops forward, 5 backward, for each query, key and head; q, "
    "k and v are read, the output written; backward reads output, its gradient and the logsumexp too, and writes 3 gradients",
    shapes=SHAPES,
    make=_make,
    ours=flash_attention,
    work=_work,
    peers=(
        plain(_plain),
        compiled(_plain),
        Peer("sdpa", lambda: _sdpa, heads_first),
        Peer("transformers", transformers_attention, _with_added_mask, needs=("transformers",)),
        Peer("torch_npu", _torch_npu, _with_mask, needs=("torch_npu",), devices=("npu",), dtypes=("bfloat16", "float16")),
    ),
    on_request=frozenset({"llama7b/2048", "grouped/1024"}),
)
