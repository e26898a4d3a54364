"""The front door of the operators: arguments as the model gives them, to the backend that serves them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from pyalpaca.ops.backend import choose


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension: weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019).

    x (..., D) and weight (D,), any floating dtypes -> like x. Reduced and scaled in fp32 or wider, rounded once.
    """
    return choose("rms_norm", x).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The step between two blocks: x + residual, rounded to their dtype, and `rms_norm` of that sum -> (norm, sum).

    x and residual (..., D) of one dtype, weight (D,) -> both like x. Differentiable by either result.
    """
    return choose("add_rms_norm", x).add_rms_norm(x, residual, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The gate of a feed-forward network: silu(gate) * up, silu(x) = x / (1 + exp(-x)) (Shazeer 2020).

    gate and up (..., F) of one dtype, perhaps halves of one tensor -> like gate. Computed in fp32 or wider, rounded once.
    """
    return choose("swiglu", gate).swiglu(gate, up)


def rope(x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in half-split order: the pair (x[i], x[i + d/2]) is turned by its angle (Su et al. 2021).

    x (B, S, H, d) with d even; cos and sin fp32 (S, d/2), or (B, S, d/2) for positions that differ in a batch -> like x.
    Differentiable in x, not in cos and sin.
    """
    return choose("rope", x_BSHd).rope(x_BSHd, cos, sin)


def rope_qk(
    q_BSHd: Tensor, k_BSKd: Tensor, cos: Tensor, sin: Tensor, positions_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`rope` of q and k in one pass, wherever they lie, as in a fused projection -> like q, like k.

    positions_BS: int64, the row of cos and sin, (P, d/2), that each token takes; without them the angles are as for `rope`.
    """
    return choose("rope_qk", q_BSHd).rope_qk(q_BSHd, k_BSKd, cos, sin, positions_BS)


def rope_qk_store(
    q_BSHd: Tensor,
    k_BSKd: Tensor,
    v_BSKd: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots_BS: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope_qk` for inference: k as turned and v as it is go straight into their caches too; no gradient.

    slots_BS: int64, the row of each token in the caches, contiguous (..., K, d) with all but the last two dimensions taken
    as one; what has a negative slot is not stored.
    """
    return choose("rope_qk_store", q_BSHd).rope_qk_store(
        q_BSHd, k_BSKd, v_BSKd, cos, sin, positions_BS, slots_BS, k_cache, v_cache
    )


def adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    weight_decays: Sequence[float],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    copies: Sequence[Tensor] = (),
    grad_scale: float = 1.0,
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019) on a list of tensors, in place: the values of torch.optim.AdamW.

    weights and both moments fp32 and contiguous, grads of any floating dtype, all alike in shape. weight_decays: one each.
    step: the number of this step, from 1 on. copies: of each weight in a narrower dtype, written along, or none.
    grad_scale: what the gradients are multiplied by, for clipping or a loss scale.
    """
    if weights:
        choose("adamw_", weights[0]).adamw_(
            weights, grads, exp_avgs, exp_avg_sqs, copies, weight_decays, step, lr, beta1, beta2, eps, grad_scale
        )


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of a list of tensors together, at least one -> fp64 scalar; infinite or NaN just if a number of theirs is.

    In C++ it is the same to the last bit for any number of threads.
    """
    return choose("grad_norm", grads[0]).grad_norm(grads)


def lora_merge(weight: Tensor, factors: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """A weight with LoRA factors merged in (Hu et al. 2021): weight + scale * (b a) for each (b, a, scale) in order.

    weight (O, I); b fp32 (O, r) and a fp32 (r, I), at least one pair -> like weight; no gradient. The product is rounded to
    fp32, then scaled and rounded, then added, and the sum is rounded to the dtype of weight before the next pair's turn.
    """
    return choose("lora_merge", weight).lora_merge(weight, factors)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer without bias: x weight^T, summed in fp32 or wider, rounded once.

    x (..., K) and weight (N, K), floating dtypes that may differ -> (..., N) in the dtype of x. Differentiable in both.
    """
    if has_torch_function_variadic(x, weight):  # a tensor's subclass may take it over, as F.linear lets it
        return handle_torch_function(linear, (x, weight), x, weight)
    return choose("linear", x).linear(x, weight)


def linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `linear` by its input: dy (..., N), weight (N, K) -> (..., K) in the dtype of dy."""
    return choose("linear", dy).linear_dx(dy, weight)


def linear_dweight(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of `linear` by its weight: dy (..., N) and x (..., K) of one dtype -> (N, K), summed over the rest."""
    return choose("linear", dy).linear_dweight(dy, x)


def linear_dweight_add_(total: Tensor, dy: Tensor, x: Tensor) -> None:
    """total (N, K), contiguous, += dy^T x of dy (T, N) and x (T, K); total may be wider than these. No gradient."""
    choose("linear", dy).linear_dweight_add_(total, dy, x)


def linear_dweight_split(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """`linear_dweight` of the first of several chunks, summed in fp32 without an fp32 copy of the result.

    dy (T, N) and x (T, K) of one half type -> (N, K) of that type, in whose memory lie the upper 16 bits of each fp32 sum, and
    int16 (N, K), the lower 16 bits. No gradient.
    """
    return choose("linear", dy).linear_dweight_split(dy, x)


def linear_dweight_add_split_(total: Tensor, lower: Tensor, dy: Tensor, x: Tensor, last: bool) -> None:
    """Add dy^T x of another chunk to what `linear_dweight_split` gave; with the last one `total` is the sum, rounded once."""
    choose("linear", dy).linear_dweight_add_split_(total, lower, dy, x, last)


def logit_sums(logits_TV: Tensor, labels_T: Tensor, start: int) -> Tensor:
    """Of each token the largest of its logits, the sum of exp(logit - largest), and its label's logit -> fp32 (3, T).

    logits (T, V) are those of the vocabulary from `start` on; of a label int64 (T) elsewhere the logit counts as 0.
    """
    return choose("linear", logits_TV).logit_sums(logits_TV, labels_T, start)


def logit_loss_(
    logits_TV: Tensor, labels_T: Tensor, start: int, sums_3T: Tensor, scale: float | Tensor, gradient: bool
) -> Tensor:
    """The cross entropy of each token -> fp32 (T), 0 for the label -100; if `gradient`, the logits become scale x its gradient.

    sums are what `logit_sums` gives, over the whole vocabulary: the loss is log(sums[1]) + sums[0] - sums[2], its gradient
    exp(logit - sums[0]) / sums[1] - [label]. A token without a loss has no gradient, whatever its logits are.
    """
    return choose("linear", logits_TV).logit_loss_(logits_TV, labels_T, start, sums_3T, scale, gradient)


def linear_quantized(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`linear` with a weight of integers and their scales, as `quantize` makes them; activations are not quantised.

    x (..., K), weight int8 (N, K) or uint8 (N, 16 ceil(K / 32)), scale fp32 (N, G) -> (..., N) in the dtype of x.
    Differentiable in x.
    """
    return choose("linear_quantized", x).linear_quantized(x, weight, scale)


def flash_attention(
    q_BSHd: Tensor,
    k_BTKd: Tensor,
    v_BTKd: Tensor,
    *,
    causal: bool = True,
    q_offset: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Attention softmax(scale q k^T) v, tile by tile with an online softmax (Dao 2023), without the S x T scores.

    q (B, S, H, d), k and v (B, T, K, d) of the same dtype, H a multiple of K -> like q. If causal, query i sees the keys
    j <= i + q_offset; a query that sees none gives 0. scale defaults to d**-0.5.
    """
    return _attention(q_BSHd, k_BTKd, v_BTKd, causal, q_offset, scale)[0]


def flash_attention_lse(
    q_BSHd: Tensor,
    k_BTKd: Tensor,
    v_BTKd: Tensor,
    *,
    causal: bool = True,
    q_offset: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`flash_attention` and the logsumexp of the scaled scores, (B, H, S) in fp32 or wider, -inf where no key is seen.

    With it, attentions over parts of the keys can be merged. It carries no gradient.
    """
    return _attention(q_BSHd, k_BTKd, v_BTKd, causal, q_offset, scale)


def flash_attention_packed(
    q_NHd: Tensor,
    k_MKd: Tensor,
    v_MKd: Tensor,
    starts: Sequence[int],
    *,
    kv_starts: Sequence[int] | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """`flash_attention` of sequences side by side, none of which sees another's keys, in one call; like q.

    q (N, H, d), k and v (M, K, d) of the same dtype, H a multiple of K. starts: where in q the sequences begin, and behind
    them N; kv_starts: the same in k, where it is not that of q. They rise from 0, in equal steps for an empty sequence. If
    causal, a sequence's last query sees its last key; a query that sees none gives 0. scale defaults to d**-0.5.
    """
    operator = "flash_attention_packed"
    _check_heads(operator, q_NHd, k_MKd)
    kv_starts = starts if kv_starts is None else kv_starts
    _check_starts("starts", starts, q_NHd, "q")
    _check_starts("kv_starts", kv_starts, k_MKd, "k")
    if len(starts) != len(kv_starts):
        raise ValueError(f"{operator}: found {len(starts)} starts and {len(kv_starts)} kv_starts, expected as many")
    scale = q_NHd.shape[-1] ** -0.5 if scale is None else scale
    return choose(operator, q_NHd).flash_attention_packed(q_NHd, k_MKd, v_MKd, starts, kv_starts, causal, scale)[0]


def flash_attention_backward(
    dout_BSHd: Tensor, q_BSHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, out_BSHd: Tensor, lse_BHS: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, like them, from that of the output; scale d**-0.5 and no offset.

    out and lse (B, H, S), fp32, may be those of attention over more keys than k and v hold: what comes out is then the part of
    the gradients that these keys give (Liu et al. 2023). It has no gradient of its own.
    """
    backend = choose("flash_attention", q_BSHd)
    return backend.flash_attention_backward(
        dout_BSHd, q_BSHd, k_BTKd, v_BTKd, out_BSHd, lse_BHS, causal, q_BSHd.shape[-1] ** -0.5
    )


def store_cache(x_BSKd: Tensor, cache_BTKd: Tensor, start: int, *, scales_BTK: Tensor | None = None) -> None:
    """Keys or values become the positions from `start` on of a cache that is kept as fp32, bf16, fp16 or int8.

    x (B, S, K, d); cache (B, T, K, d), its last dimension contiguous, T >= start + S. An int8 cache has scales, fp32 (B, T, K):
    the largest magnitude of a position and head over 127; an infinity or NaN makes that position and head NaN.
    """
    choose("store_cache", x_BSKd).store_cache(x_BSKd, cache_BTKd, scales_BTK, start)


def cached_attention(
    q_BSHd: Tensor,
    k_BTKd: Tensor,
    v_BTKd: Tensor,
    length: int,
    *,
    k_scales_BTK: Tensor | None = None,
    v_scales_BTK: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of the last S queries of a sequence of `length` over the cache that `store_cache` filled; no gradient.

    q (B, S, H, d) of any dtype, k and v (B, T, K, d) of another or the same, T >= length >= S -> like q. One query (decoding)
    is as fast as k and v come from memory, most so where a head's positions lie one after the other. scale: d**-0.5.
    """
    scale = q_BSHd.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose("cached_attention", q_BSHd)
    return chosen.cached_attention(q_BSHd, k_BTKd, v_BTKd, k_scales_BTK, v_scales_BTK, length, scale)


def _attention(
    q_BSHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, causal: bool, q_offset: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    _check_heads("flash_attention", q_BSHd, k_BTKd)
    scale = q_BSHd.shape[-1] ** -0.5 if scale is None else scale
    return choose("flash_attention", q_BSHd).flash_attention(q_BSHd, k_BTKd, v_BTKd, causal, q_offset, scale)


def _check_heads(operator: str, q: Tensor, k: Tensor) -> None:
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(
            f"{operator}: q has {heads} heads and k has {kv_heads}; "
            "expected a number of query heads that the number of key heads divides"
        )


def _check_starts(name: str, starts: Sequence[int], x: Tensor, of: str) -> None:
    rising = len(starts) > 1 and starts[0] == 0 and all(a <= b for a, b in pairwise(starts))
    if not rising or starts[-1] != x.shape[0]:
        raise ValueError(
            f"flash_attention_packed: {name} are {list(starts)}, "
            f"expected numbers that rise from 0 to {x.shape[0]}, the number of tokens of {of}"
        )
