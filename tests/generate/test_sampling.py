"""From logits to a token: each cut equals transformers', and draws follow the distribution."""

from __future__ import annotations

import pytest
import torch

from pyalpaca.generate.sampling import Sampling, choose, cut, penalise


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(8, 200, generator=torch.Generator().manual_seed(0)) * 4


@pytest.fixture
def seen() -> torch.Tensor:
    return torch.randint(200, (8, 30), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_the_repetition_penalty_is_that_of_transformers(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
    assert torch.equal(penalise(logits, seen, penalty), expected)


@pytest.mark.parametrize("top_k", [0, 1, 7, 200, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_the_cuts_are_those_of_transformers(logits: torch.Tensor, seen: torch.Tensor, top_k: int, top_p: float) -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    expected = TopKLogitsWarper(top_k)(seen, logits.clone()) if top_k else logits
    expected = TopPLogitsWarper(top_p)(seen, expected) if top_p < 1 else expected
    assert torch.equal(cut(logits, top_k, top_p), expected)


def test_all_of_it_in_order_draws_what_transformers_would_draw(logits: torch.Tensor, seen: torch.Tensor) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    expected = logits.clone()
    for step in (
        RepetitionPenaltyLogitsProcessor(1.2),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.8),
    ):
        expected = step(seen, expected)
    theirs = torch.multinomial(expected.softmax(-1), 1, generator=torch.Generator().manual_seed(5)).squeeze(-1)
    sampling = Sampling(temperature=0.7, top_k=40, top_p=0.8, repetition_penalty=1.2)
    assert torch.equal(choose(logits, seen, sampling, torch.Generator().manual_seed(5)), theirs)


def test_without_a_temperature_the_most_likely_token_is_taken_after_the_penalty() -> None:
    logits, seen = torch.tensor([[1.0, 3.0, 2.9]]), torch.tensor([[1]])
    assert choose(logits, seen, Sampling()).tolist() == [1]
    assert choose(logits, seen, Sampling(repetition_penalty=2.0)).tolist() == [2]


def test_draws_are_as_frequent_as_their_probability() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20000, 4)
    drawn = choose(logits, torch.zeros(20000, 1, dtype=torch.int64), Sampling(temperature=2.0), torch.Generator().manual_seed(0))
    frequency = drawn.bincount(minlength=4) / 20000
    torch.testing.assert_close(frequency, (logits[0] / 2).softmax(-1), atol=0.015, rtol=0)


def test_a_seed_draws_the_same_again(logits: torch.Tensor, seen: torch.Tensor) -> None:
    first, second, other = (choose(logits, seen, Sampling(1.0), torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"repetition_penalty": 0.0}]
)
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
