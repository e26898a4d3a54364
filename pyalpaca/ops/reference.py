"""The operators in plain torch: any dtype, any device, differentiable by autograd. The oracle of the tests and the fallback."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalpaca.ops.quantize import dequantize


def refusal(operator: str, x: Tensor) -> str | None:
    """Why this backend can't serve `operator` on tensors like `x`: it always can."""
    return None


def _wide(x: Tensor) -> Tensor:
    """fp32, or fp64 where the input is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), rounded once, to the dtype of x (Zhang and Sennrich 2019)."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * rstd * _wide(weight)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm of x + residual, and that sum, which is rounded to their dtype first."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, rounded once (Shazeer 2020)."""
    return (torch.nn.functional.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def rope(x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) by their angles (Su et al. 2021, in Hugging Face's half-split order)."""
    first, second = _wide(x_BSHd).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BSHd.dtype)


def rope_qk(q_BSHd: Tensor, k_BSKd: Tensor, cos: Tensor, sin: Tensor, positions_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    """rope of both, by the angles of their positions."""
    if positions_BS is not None:
        cos, sin = cos[positions_BS], sin[positions_BS]
    return rope(q_BSHd, cos, sin), rope(k_BSKd, cos, sin)


def rope_qk_store(
    q_BSHd: Tensor,
    k_BSKd: Tensor,
    v_BSKd: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions_BS: Tensor | None,
    slots_BS: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> tuple[Tensor, Tensor]:
    """rope_qk, then the rows of k and v into those of the caches."""
    q, k = rope_qk(q_BSHd, k_BSKd, cos, sin, positions_BS)
    store_rows(slots_BS, k, k_cache, v_BSKd, v_cache)
    return q, k


def store_rows(slots_BS: Tensor, k: Tensor, k_cache: Tensor, v: Tensor, v_cache: Tensor) -> None:
    """Put each token's heads into row slots_BS of the caches, if that is not negative."""
    wanted = slots_BS >= 0
    for x, cache in ((k, k_cache), (v, v_cache)):
        cache.view(-1, *cache.shape[-2:])[slots_BS[wanted]] = x[wanted]


@torch.no_grad()
def adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    weight_decays: Sequence[float],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: float,
) -> None:
    """The step as torch.optim.AdamW writes it down, one tensor after the other."""
    for i, (weight, grad, mean, square) in enumerate(zip(weights, grads, exp_avgs, exp_avg_sqs, strict=True)):
        wide = grad.to(weight.dtype) * grad_scale
        weight.mul_(1 - lr * weight_decays[i])
        mean.lerp_(wide, 1 - beta1)
        square.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
        root = (square.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
        weight.addcdiv_(mean, root, value=-lr / (1 - beta1**step))
        if copies:
            copies[i].copy_(weight)


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of the norms, in fp64."""
    norms = [torch.linalg.vector_norm(grad.detach(), dtype=torch.float64) for grad in grads]
    return torch.linalg.vector_norm(torch.stack(norms))


def lora_merge(weight: Tensor, factors: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """weight + scale * (b a), each step rounded to fp32 and the sum to the dtype of weight, as the original merge does."""
    for b, a, scale in factors:
        weight = (_wide(weight) + (_wide(b) @ _wide(a)) * scale).to(weight.dtype)
    return weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in the dtype of x; the weight may be of another one."""
    return F.linear(x, weight) if x.dtype == weight.dtype else F.linear(_wide(x), _wide(weight)).to(x.dtype)


def linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `linear` by x: dy weight."""
    return dy @ weight if dy.dtype == weight.dtype else (_wide(dy) @ _wide(weight)).to(dy.dtype)


def linear_dweight(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of `linear` by the weight: dy^T x, summed over all leading dimensions."""
    return dy.flatten(0, -2).t() @ x.flatten(0, -2)


def linear_dweight_add_(total: Tensor, dy: Tensor, x: Tensor) -> None:
    """total += dy^T x."""
    total += linear_dweight(dy, x)


def linear_dweight_split(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """dy^T x in fp32, its upper 16 bits in a tensor of the dtype of x, its lower ones in another of int16."""
    total, lower = x.new_empty(dy.shape[1], x.shape[1]), x.new_empty(dy.shape[1], x.shape[1], dtype=torch.int16)
    _split_into(_wide(dy).t() @ _wide(x), total, lower)
    return total, lower


def linear_dweight_add_split_(total: Tensor, lower: Tensor, dy: Tensor, x: Tensor, last: bool) -> None:
    """total and lower += dy^T x; with the last one total becomes the sum, rounded."""
    bits = total.view(torch.int16).int().bitwise_left_shift(16) | (lower.int() & 0xFFFF)
    found = bits.view(torch.float32) + _wide(dy).t() @ _wide(x)
    if last:
        total.copy_(found)
    else:
        _split_into(found, total, lower)


def _split_into(wide: Tensor, upper: Tensor, lower: Tensor) -> None:
    bits = wide.view(torch.int32)
    upper.view(torch.int16).copy_(bits.bitwise_right_shift(16))  # int32 -> int16 keeps the lower 16 bits
    lower.copy_(bits)


def logit_sums(logits_TV: Tensor, labels_T: Tensor, start: int) -> Tensor:
    """Of each row the largest, the sum of exp(logit - largest), and the label's logit, 0 where it is not among these."""
    wide_TV = _wide(logits_TV)
    if not wide_TV.shape[1]:
        return torch.stack([wide_TV.new_full(labels_T.shape, value) for value in (-math.inf, 0.0, 0.0)])
    top_T1 = wide_TV.amax(-1, keepdim=True)
    weights_TV = (wide_TV - top_T1.where(top_T1 != -math.inf, 0.0)).exp_()
    index_T1, mine_T = _columns(labels_T, start, wide_TV.shape[1])
    target_T = wide_TV.gather(-1, index_T1).squeeze(-1).where(mine_T, 0.0)
    return torch.stack((top_T1.squeeze(-1), weights_TV.sum(-1), target_T))


def logit_loss_(
    logits_TV: Tensor, labels_T: Tensor, start: int, sums_3T: Tensor, scale: float | Tensor, gradient: bool
) -> Tensor:
    """The cross entropy of each row, 0 for the label -100; its gradient times `scale` in the logits' place if it is wanted."""
    (top_T, total_T, target_T), counted_T = sums_3T, labels_T != -100
    if gradient and logits_TV.shape[1]:
        gradient_TV = (_wide(logits_TV) - top_T.unsqueeze(-1)).exp_().div_(total_T.unsqueeze(-1))
        index_T1, mine_T = _columns(labels_T, start, logits_TV.shape[1])
        gradient_TV.scatter_add_(-1, index_T1, -mine_T.to(gradient_TV.dtype).unsqueeze(-1))
        logits_TV.copy_((gradient_TV * scale).where(counted_T.unsqueeze(-1), 0.0))
    return (total_T.log() + top_T - target_T).where(counted_T, 0.0)


def _columns(labels_T: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """The labels as indices of so many columns from `start` on, (T, 1), and whether they are there; elsewhere the index is 0."""
    local_T = labels_T - start
    mine_T = (local_T >= 0) & (local_T < columns)
    return local_T.where(mine_T, 0).unsqueeze(-1), mine_T


def linear_quantized(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`linear` with the weight that integers and scales stand for."""
    wide = dequantize(weight, scale, x.shape[-1])
    return F.linear(_wide(x), wide.to(_wide(x).dtype)).to(x.dtype)


def cached(cache: Tensor, scales: Tensor | None, length: int) -> Tensor:
    """The first `length` positions of a cache as they count: int8 times its scales, others as they are."""
    part = cache[:, :length]
    return part if scales is None else part.float() * scales[:, :length, :, None]


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, length: int, scale: float
) -> Tensor:
    """Causal attention of the last queries of a sequence over a cache."""
    return flash_attention(q, cached(k, k_scales, length), cached(v, v_scales, length), True, length - q.shape[1], scale)[0]


def store_cache(x: Tensor, cache: Tensor, scales: Tensor | None, start: int) -> None:
    """x becomes positions of the cache, rounded; int8: to the nearest of 255 steps, a row's largest magnitude over 127 each."""
    stop = start + x.shape[1]
    if scales is None:
        cache[:, start:stop] = x
        return
    wide = x.float()
    top = wide.abs().amax(-1)
    scale = torch.where(top.isfinite(), top / 127, torch.nan)
    inverse = torch.where(scale >= 2.0**-126, 1 / scale, 0.0)
    scales[:, start:stop] = scale
    cache[:, start:stop] = (wide * inverse[..., None]).clamp(-127, 127).nan_to_num(0.0).round()


def flash_attention(
    q_BSHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, causal: bool, q_offset: int, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v and the logsumexp of the scores (B, H, S); the scores are held whole."""
    num_queries, num_keys = q_BSHd.shape[1], k_BTKd.shape[1]
    group = q_BSHd.shape[2] // max(k_BTKd.shape[2], 1)
    q_BHSd = _wide(q_BSHd).transpose(1, 2)
    k_BHTd = _wide(k_BTKd).transpose(1, 2).repeat_interleave(group, dim=1)
    v_BHTd = _wide(v_BTKd).transpose(1, 2).repeat_interleave(group, dim=1)
    scores_BHST = (q_BHSd * scale) @ k_BHTd.transpose(-1, -2)
    if causal:
        last_key = torch.arange(num_queries, device=q_BSHd.device)[:, None] + q_offset
        hidden_ST = torch.arange(num_keys, device=q_BSHd.device) > last_key
        scores_BHST = scores_BHST.masked_fill(hidden_ST, float("-inf"))
    lse_BHS = torch.logsumexp(scores_BHST.detach(), dim=-1)
    # A row that sees no key has lse -inf; with 0 in its place its probabilities are exp(-inf) = 0, and so is its output.
    safe_BHS = lse_BHS.masked_fill(lse_BHS == float("-inf"), 0.0)
    weight_BHST = torch.exp(scores_BHST - safe_BHS[..., None])
    # The logsumexp was detached, so the gradient of the normalisation comes from dividing by the sum (1 up to rounding).
    total_BHS1 = weight_BHST.sum(-1, keepdim=True)
    weight_BHST = weight_BHST / total_BHS1.masked_fill(total_BHS1 == 0, 1.0)
    return (weight_BHST @ v_BHTd).transpose(1, 2).to(q_BSHd.dtype), lse_BHS


def flash_attention_packed(
    q_NHd: Tensor, k_MKd: Tensor, v_MKd: Tensor, q_starts: Sequence[int], kv_starts: Sequence[int], causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention within each sequence, whose last query sees its last key, and the logsumexp (H, N)."""
    return one_by_one(flash_attention, q_NHd, k_MKd, v_MKd, q_starts, kv_starts, causal, scale)


def one_by_one(
    attention: Callable[[Tensor, Tensor, Tensor, bool, int, float], tuple[Tensor, Tensor]],
    q_NHd: Tensor,
    k_MKd: Tensor,
    v_MKd: Tensor,
    q_starts: Sequence[int],
    kv_starts: Sequence[int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """flash_attention_packed as a call of flash_attention a sequence."""
    lengths, kv_lengths = ([end - begin for begin, end in pairwise(starts)] for starts in (q_starts, kv_starts))
    # Splitting all at once makes the gradient one concatenation.
    parts = zip(q_NHd.split(lengths), k_MKd.split(kv_lengths), v_MKd.split(kv_lengths), strict=True)
    results = [attention(q[None], k[None], v[None], causal, len(k) - len(q), scale) for q, k, v in parts]
    return torch.cat([out[0] for out, _ in results]), torch.cat([lse[0] for _, lse in results], dim=-1)


def flash_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that these keys give, of attention over them and perhaps others, whose output and logsumexp are given."""
    heads, group = k.shape[2], q.shape[2] // k.shape[2]
    q_BKGSd, dout_BKGSd, out_BKGSd = (_wide(x).unflatten(2, (heads, group)).permute(0, 2, 3, 1, 4) for x in (q, dout, out))
    k_BK1Td, v_BK1Td = (_wide(x).transpose(1, 2).unsqueeze(2) for x in (k, v))
    weight_BKGST = torch.exp(q_BKGSd * scale @ k_BK1Td.transpose(-1, -2) - lse.unflatten(1, (heads, group))[..., None])
    if causal:
        weight_BKGST = weight_BKGST.tril()
    dweight_BKGST = dout_BKGSd @ v_BK1Td.transpose(-1, -2) - (dout_BKGSd * out_BKGSd).sum(-1, keepdim=True)
    dscores_BKGST = weight_BKGST * dweight_BKGST * scale
    dq = (dscores_BKGST @ k_BK1Td).permute(0, 3, 1, 2, 4).flatten(2, 3)
    dk = (dscores_BKGST.transpose(-1, -2) @ q_BKGSd).sum(2).transpose(1, 2)
    dv = (weight_BKGST.transpose(-1, -2) @ dout_BKGSd).sum(2).transpose(1, 2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
