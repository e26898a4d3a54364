"""Dropout before LoRA: masks that behave like chance, the same wherever they are made, and PEFT's arithmetic."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor
from twin import transformers_twin

from pyalpaca.model import (
    Dropout,
    LlamaConfig,
    Recompute,
    flatten,
    forward,
    init,
    lora_parameters,
    parameters,
    unflatten,
)
from pyalpaca.model.dropout import mask

MODEL = LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=56, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, norm_eps=1e-5
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(2 * 24).reshape(2, 24) * 7 % MODEL.vocab_size
DROPOUT = Dropout(0.3, 42, torch.tensor([5, 900]))


def leaves(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    table = parameters(MODEL)
    whole = flatten(init([*table, *lora_parameters(table, 3, TARGETS)], seed=1, dtype=dtype))
    for path, t in whole.items():
        if path.endswith("lora_b"):
            t += torch.randn(t.shape, generator=torch.Generator().manual_seed(len(path))).to(dtype) * 0.1
        t.requires_grad_("lora" in path)
    return whole


def loss(tree: dict[str, Tensor], dropout: Dropout | None = DROPOUT, mode: Recompute = "none") -> Tensor:
    logits = forward(unflatten(tree), TOKENS, replace(MODEL, lora_scale=0.5), recompute=mode, dropout=dropout)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_a_mask_drops_its_share_in_every_row_and_column(rate: float) -> None:
    dropped = 1 - mask(Dropout(rate, 1, torch.arange(40)), "layers.0.q", 300, 0, 512).double()
    deviation = (rate * (1 - rate)) ** 0.5
    for dims in ((0, 1, 2), (0, 1), (1, 2), (2,), (0, 2)):
        n = dropped.numel() / dropped.mean(dims).numel()
        scores = (dropped.mean(dims) - rate) * n**0.5 / deviation  # standard normal, if chance
        assert scores.abs().max() < 5.5
        if scores.numel() > 1:
            assert scores.square().mean() == pytest.approx(1.0, abs=6 * (2 / scores.numel()) ** 0.5)


def test_masks_of_other_seeds_samples_layers_modules_tokens_and_features_do_not_agree() -> None:
    def one(seed: int = 1, sample: int = 7, place: str = "layers.0.q") -> Tensor:
        return mask(Dropout(0.5, seed, torch.tensor([sample])), place, 400, 0, 500)[0].double() * 2 - 1

    base = one()
    others = [one(seed=2), one(sample=8), one(sample=7 + (1 << 20)), one(place="layers.0.k"), one(place="layers.1.q")]
    pairs = list(combinations([base, *others], 2))
    pairs += [(base[by:], base[:-by]) for by in (1, 2, 16)] + [(base[:, by:], base[:, :-by]) for by in (1, 2, 64)]
    pairs += [(base[:256, :256], base[:256, :256].T)]
    for a, b in pairs:
        assert abs((a * b).mean()) * a.numel() ** 0.5 < 4.5
    # No three are tied either, as they would be in a linear generator.
    a, b, c, d = base[:-1, :-1], base[1:, :-1], base[:-1, 1:], base[1:, 1:]
    assert abs((a * b * c * d).mean()) * a.numel() ** 0.5 < 4.5


def test_a_piece_of_a_mask_is_the_masks_piece() -> None:
    whole = mask(DROPOUT, "layers.0.down", 20, 0, 56)
    assert torch.equal(mask(DROPOUT, "layers.0.down", 20, 14, 28), whole[:, :, 14:28])
    assert torch.equal(mask(DROPOUT, "layers.0.down", 9, 0, 56), whole[:, :9])
    assert torch.equal(mask(replace(DROPOUT, samples=DROPOUT.samples[1:]), "layers.0.down", 20, 0, 56), whole[1:])


def test_a_rate_of_zero_drops_nothing_and_one_of_nearly_one_nearly_all() -> None:
    assert mask(replace(DROPOUT, rate=0.0), "layers.0.q", 50, 0, 50).all()
    assert not mask(replace(DROPOUT, rate=1 - 1e-12), "layers.0.q", 50, 0, 50).any()


def test_masks_stay_as_they_are_so_that_old_runs_resume() -> None:
    bits = mask(Dropout(0.5, 42, torch.tensor([3])), "layers.1.up", 2, 0, 32)[0]
    assert ["".join(map(str, row.int().tolist())) for row in bits] == [
        "00101010100010101011010100110010",
        "00100100111111011110000000101010",
    ]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers
def test_loss_and_gradients_are_pefts_under_the_same_masks() -> None:
    from peft import LoraConfig, get_peft_model

    class Same(torch.nn.Module):
        """What stands in the place of torch.nn.Dropout in PEFT's layer, with our masks."""

        def __init__(self, place: str) -> None:
            super().__init__()
            self.place = place

        def forward(self, x: Tensor) -> Tensor:
            assert self.training
            return x * mask(DROPOUT, self.place, x.shape[1], 0, x.shape[2]) / (1 - DROPOUT.rate)

    tree = leaves()
    base = {path: t.detach() for path, t in tree.items() if "lora" not in path}
    twin = transformers_twin(MODEL, unflatten(base))
    peft = get_peft_model(twin, LoraConfig(r=3, lora_alpha=1.5, lora_dropout=0.3, target_modules=TARGETS)).train()
    factors = {p.path: p.name for p in lora_parameters(parameters(MODEL), 3, TARGETS)}
    theirs = {
        path: peft.get_parameter("base_model.model." + name.replace(".weight", ".default.weight"))
        for path, name in factors.items()
    }
    with torch.no_grad():
        for path, parameter in theirs.items():
            parameter.copy_(tree[path])
    for name, module in peft.named_modules():
        if name.endswith("lora_dropout"):
            layer, kind = name.split(".")[-4], name.split(".")[-2].removesuffix("_proj")
            module["default"] = Same(f"layers.{layer}.{kind}")
    logits = peft(TOKENS).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    found = loss(tree)
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for path, parameter in theirs.items():
        torch.testing.assert_close(tree[path].grad, parameter.grad, atol=1e-6, rtol=1e-4, msg=lambda m, path=path: f"{path}: {m}")
    assert abs(loss(tree, None) - found) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_makes_the_same_masks_again(dtype: torch.dtype) -> None:
    plain = leaves(dtype)
    expected = loss(plain)
    expected.backward()
    for mode in ("selective", "full"):
        again = leaves(dtype)
        found = loss(again, mode=mode)
        found.backward()
        assert torch.equal(found, expected)
        assert all(t.grad is None or torch.equal(t.grad, again[path].grad) for path, t in plain.items())


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_what_is_dropped_takes_no_memory(mode: Recompute) -> None:
    def kept(dropout: Dropout | None) -> int:
        tree = leaves()
        with torch.profiler.profile(profile_memory=True) as profile:
            held = loss(tree, dropout, mode)
        assert held.requires_grad
        return sum(event.self_cpu_memory_usage for event in profile.events())

    one = TOKENS.numel() * MODEL.hidden_size * 4
    assert kept(DROPOUT) - kept(None) < one / 2


def test_dropout_leaves_weights_without_factors_alone() -> None:
    tree = {path: t for path, t in leaves().items() if "lora" not in path}
    assert torch.equal(loss(tree), loss(tree, None))
