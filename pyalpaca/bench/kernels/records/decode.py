"""Attention of one new token over the cache of those before it, as every step of generation takes it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalpaca.bench.kernels.operator import Case, Function, Operator, Peer, Work, compiled, plain
from pyalpaca.bench.kernels.records.attention import heads_first, transformers_attention
from pyalpaca.generate.cache import new_cache
from pyalpaca.model import LlamaConfig
from pyalpaca.ops import cached_attention, reference, store_cache

SHAPES = {
    "llama7b/2048": (1, 32, 32, 128, 2048),
    "llama13b/2048": (1, 40, 40, 128, 2048),
    "grouped/8192": (1, 32, 8, 128, 8192),
    "grouped8/8192": (1, 64, 8, 128, 8192),
    "small/64": (2, 4, 2, 64, 64),
}
SCALE = 4.0  # bytes of the scale of a position and head


def _make(case: Case) -> list[Any]:
    """One query a sequence, and a full cache as generation keeps it: on huge pages, on a CPU head by head; int8 has scales."""
    batch, heads, kv_heads, head_dim, length = case.sizes
    integers = case.dtype == "int8"
    q = case.random(batch, 1, heads, head_dim, dtype=torch.float32 if integers else None, grad=False)
    config = LlamaConfig(1, heads * head_dim, 1, 1, heads, kv_heads, head_dim)
    (cache,) = new_cache(config, length, case.torch_dtype, torch.device(case.device), batch=batch)
    for held, scales in ((cache.k, cache.k_scales), (cache.v, cache.v_scales)):
        x = case.random(batch, length, kv_heads, head_dim, dtype=torch.float32, grad=False)
        store_cache(x, held, 0, scales_BTK=scales)
    return [q, cache.k, cache.v, cache.k_scales, cache.v_scales]


def _work(case: Case, direction: str) -> Work:
    batch, heads, kv_heads, head_dim, length = case.sizes
    activation, scale = (4.0, SCALE) if case.dtype == "int8" else (case.item, 0.0)
    q = batch * heads * head_dim * activation
    cache = batch * kv_heads * length * (head_dim * case.item + scale)
    return Work(4.0 * batch * heads * head_dim * length, q + 2 * cache, q)


def _ours(q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> Tensor:
    return cached_attention(q, k, v, k.shape[1], k_scales_BTK=k_scales, v_scales_BTK=v_scales)


def _plain(q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> Tensor:
    return reference.cached_attention(q, k, v, k_scales, v_scales, k.shape[1], q.shape[-1] ** -0.5)


def _widened(inputs: list[Any]) -> list[Any]:
    """Heads first, and the cache in the dtype of the query: torch has no attention over integers."""
    q, *rest = inputs
    caches = (reference.cached(x, scales, x.shape[1]).to(q.dtype) for x, scales in zip(rest[:2], rest[2:], strict=True))
    return heads_first([q, *caches])


def _sdpa(q_BH1d: Tensor, k_BKTd: Tensor, v_BKTd: Tensor) -> Tensor:
    grouped = q_BH1d.shape[1] != k_BKTd.shape[1]
    return F.scaled_dot_product_attention(q_BH1d, k_BKTd, v_BKTd, enable_gqa=grouped).transpose(1, 2)


def _torch_npu() -> Function:
    import torch_npu

    def attention(q_BH1d: Tensor, k_BKTd: Tensor, v_BKTd: Tensor) -> Any:
        heads: dict[str, Any] = {"num_heads": q_BH1d.shape[1], "num_key_value_heads": k_BKTd.shape[1]}
        out_BH1d, _ = torch_npu.npu_fused_infer_attention_score(
            q_BH1d, k_BKTd, v_BKTd, **heads, scale=q_BH1d.shape[-1] ** -0.5, input_layout="BNSD"
        )
        return out_BH1d.transpose(1, 2)

    return attention


CACHED_ATTENTION = Operator(
    "cached_attention",
    axes="batch x heads x kv heads x head_dim x positions in the cache",
    formula="one query a sequence: it, and the keys, values and scales of the cache are read, the output is written; 4 d flops a "
    "head and position",
    shapes=SHAPES,
    make=_make,
    ours=_ours,
    work=_work,
    peers=(
        plain(_plain),
        compiled(_plain),
        Peer("sdpa", lambda: _sdpa, _widened),
        Peer("transformers", transformers_attention, _widened, needs=("transformers",)),
        Peer("torch_npu", _torch_npu, _widened, needs=("torch_npu",), devices=("npu",), dtypes=("bfloat16", "float16")),
    ),
    dtypes=("float32", "bfloat16", "float16", "int8"),
    directions=("fwd",),
    on_request=frozenset({"llama13b/2048", "grouped8/8192"}),
)
