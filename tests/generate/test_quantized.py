"""Generation with weights as integers: near the fp32 logits, as likely a text, and the same on tensor-parallel ranks' pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pyalpaca.generate.engine import Model, generate_ids, load_model
from pyalpaca.generate.run import main
from pyalpaca.model import flatten, forward


@pytest.fixture(scope="module")
def tokens(model: Model) -> torch.Tensor:
    """What the fp32 model itself says, which it finds likely."""
    prompt = model.tokenizer.encode("Give three tips", bos=True)
    return torch.tensor([[*prompt, *generate_ids(model, prompt, 60)]])


def perplexity(logits_BSV: torch.Tensor, tokens_BS: torch.Tensor) -> float:
    return F.cross_entropy(logits_BSV[0, :-1], tokens_BS[0, 1:]).exp().item()


@pytest.mark.parametrize(("bits", "group", "error", "worse"), [(8, None, 0.02, 1.02), (8, 32, 0.02, 1.02), (4, 32, 0.25, 1.6)])
def test_logits_and_perplexity_stay_near_fp32(
    folder: Path, model: Model, tokens: torch.Tensor, bits: int, group: int | None, error: float, worse: float
) -> None:
    small = load_model(folder, bits=bits, group=group)
    with torch.inference_mode():
        exact = forward(model.params, tokens, model.config)
        found = forward(small.params, tokens, small.config)
    assert 0 < (found - exact).norm() / exact.norm() < error
    assert perplexity(found, tokens) < worse * perplexity(exact, tokens)


def test_the_tree_holds_integers_for_every_product_and_nothing_else(folder: Path) -> None:
    kinds = {path: t.dtype for path, t in flatten(load_model(folder, bits=4, dtype=torch.bfloat16).params).items()}
    for path, dtype in kinds.items():
        if path.endswith(".weight"):
            assert dtype == torch.uint8, path
        else:
            assert dtype == (torch.float32 if path.endswith(".scale") else torch.bfloat16), path
    assert kinds["head.weight"] == torch.uint8 and kinds["embed"] == torch.bfloat16
    assert sum(dtype == torch.uint8 for dtype in kinds.values()) == 7 * 2 + 1


@pytest.mark.parametrize("flags", [["--quantize", "int8"], ["--quantize", "int4", "--quantize-group", "64", "--dtype", "bf16"]])
def test_the_command_answers(folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert main(["--model", str(folder), "--prompt", "first", "--max-new-tokens", "6", *flags]) == 0
    assert capsys.readouterr().out.strip()


def test_int8_says_what_fp32_says(folder: Path, model: Model) -> None:
    prompt = [1, 5, 9, 30]
    assert list(generate_ids(load_model(folder, bits=8, group=32), prompt, 8)) == list(generate_ids(model, prompt, 8))


def test_a_group_without_integers_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="found --quantize-group without --quantize, which alone uses it"):
        main(["--model", str(folder), "--prompt", "x", "--quantize-group", "64"])
