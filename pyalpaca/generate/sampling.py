"""From logits to the next token: repetition penalty, temperature, top-k, top-p, draw; in that order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: the most likely one, always; top_k 0 and top_p 1: no cut.

    ValueError for values outside of their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise ValueError(
                f"sampling: temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}, repetition_penalty "
                f"{self.repetition_penalty}; expected >= 0, >= 0, in (0, 1] and > 0"
            )


def penalise(logits_BV: Tensor, seen_BT: Tensor, penalty: float) -> Tensor:
    """Make tokens that have occurred less likely (Keskar et al. 2019): positive logits are divided, negative multiplied."""
    if penalty == 1.0:
        return logits_BV
    score = logits_BV.gather(-1, seen_BT)
    return logits_BV.scatter(-1, seen_BT, torch.where(score < 0, score * penalty, score / penalty))


def cut(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf all but the top_k most likely tokens, then all outside of the smallest set whose probability reaches top_p."""
    if 0 < top_k < logits_BV.shape[-1]:
        worst = logits_BV.topk(top_k).values[..., -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < worst, -torch.inf)
    if top_p < 1.0:
        ascending, order = logits_BV.sort(-1)
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        outside[..., -1] = False  # the most likely token always stays
        logits_BV = logits_BV.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits_BV


def choose(logits_BV: Tensor, seen_BT: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """The next token of each row, int64 (B,); seen_BT: the ids so far, prompt included."""
    logits_BV = penalise(logits_BV.float(), seen_BT, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    probability = cut(logits_BV / sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1)
    return torch.multinomial(probability.cpu(), 1, generator=generator).squeeze(-1).to(logits_BV.device)
