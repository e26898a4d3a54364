"""Attention of sequences side by side, as the loader packs those of a fine-tuning, none of which sees another."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalpaca.bench.kernels.operator import Case, Operator, Peer, Work, plain, relaid
from pyalpaca.ops import flash_attention_packed, reference

SHAPES = {
    "llama7b/2048": (2048, 32, 32, 128, 120),
    "grouped/4096": (4096, 32, 8, 64, 200),
    "alone/2048": (2048, 8, 1, 128, 2048),
    "small/512": (512, 4, 4, 32, 60),
}


def starts_of(tokens: int, mean: int) -> list[int]:
    """Where sequences begin that fill so many tokens, and their end: lengths are exponential about `mean`, as those of Alpaca's
    records nearly are, and the same in every run; one sequence where the mean is all there is."""
    generator, starts = random.Random(0), [0]
    while mean < tokens and (following := starts[-1] + max(1, int(generator.expovariate(1 / mean)))) < tokens:
        starts.append(following)
    return [*starts, tokens]


def _make(case: Case) -> list[Any]:
    tokens, heads, kv_heads, head_dim, mean = case.sizes
    return [*(case.random(tokens, n, head_dim) for n in (heads, kv_heads, kv_heads)), starts_of(tokens, mean)]


def _work(case: Case, direction: str) -> Work:
    tokens, heads, kv_heads, head_dim, mean = case.sizes
    seen = sum((end - begin) * (end - begin + 1) / 2 for begin, end in pairwise(starts_of(tokens, mean)))
    product = 2.0 * heads * head_dim * seen
    q, kv = (tokens * n * head_dim * case.item for n in (heads, kv_heads))
    if direction == "fwd":
        return Work(2 * product, q + 2 * kv, q)
    return Work(5 * product, 3 * q + 2 * kv + 4.0 * tokens * heads, q + 2 * kv)


def _plain(q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, starts: list[int]) -> Tensor:
    return reference.flash_attention_packed(q_NHd, k_NKd, v_NKd, starts, starts, True, q_NHd.shape[-1] ** -0.5)[0]


def _heads_first(inputs: list[Any]) -> list[Any]:
    """(1, H, N, d) in memory."""
    *tensors, starts = inputs
    return [*(relaid(x, lambda x: x.transpose(0, 1)[None]) for x in tensors), starts]


def _sdpa(q_1HNd: Tensor, k_1KNd: Tensor, v_1KNd: Tensor, starts: list[int]) -> Tensor:
    grouped, lengths = q_1HNd.shape[1] != k_1KNd.shape[1], [end - begin for begin, end in pairwise(starts)]
    parts = zip(*(x.split(lengths, 2) for x in (q_1HNd, k_1KNd, v_1KNd)), strict=True)
    outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped) for q, k, v in parts]
    return torch.cat(outs, 2)[0].transpose(0, 1)


def _with_mask(inputs: list[Any]) -> list[Any]:
    *tensors, starts = _heads_first(inputs)
    lengths = torch.tensor([end - begin for begin, end in pairwise(starts)])
    sequence_N = torch.arange(len(lengths)).repeat_interleave(lengths).to(tensors[0].device)
    return [*tensors, (sequence_N[:, None] == sequence_N).tril()]


def _sdpa_mask(q_1HNd: Tensor, k_1KNd: Tensor, v_1KNd: Tensor, mask_NN: Tensor) -> Tensor:
    grouped = q_1HNd.shape[1] != k_1KNd.shape[1]
    return F.scaled_dot_product_attention(q_1HNd, k_1KNd, v_1KNd, mask_NN, enable_gqa=grouped)[0].transpose(0, 1)


FLASH_ATTENTION_PACKED = Operator(
    "flash_attention_packed",
    axes="tokens x heads x kv heads x head_dim x mean length of a sequence",
    formula="as flash_attention, of each sequence by itself; their lengths are exponential about the mean",
    shapes=SHAPES,
    make=_make,
    ours=flash_attention_packed,
    work=_work,
    peers=(
        plain(_plain),
        Peer("sdpa", lambda: _sdpa, _heads_first),
        Peer("sdpa_mask", lambda: _sdpa_mask, _with_mask),
    ),
    on_request=frozenset({"alone/2048"}),
)
