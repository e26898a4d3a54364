"""Recomputation: it changes no bit, keeps what it says, and selective does no matrix product twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyalpaca.model import LlamaConfig, Recompute, flatten, forward, init, lora_parameters, parameters, unflatten
from pyalpaca.model.recompute import recomputing

MODEL = LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=56, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=8, norm_eps=1e-5
)
TOKENS = torch.arange(2 * 24).reshape(2, 24) * 7 % MODEL.vocab_size
MODES: list[tuple[Recompute, int]] = [("selective", 1), ("full", 1), ("selective", 2), ("full", 3)]


def leaves(dtype: torch.dtype = torch.float32, lora: bool = False) -> dict[str, Tensor]:
    table = parameters(MODEL)
    factors = lora_parameters(table, 3, ["q_proj", "up_proj", "down_proj"]) if lora else []
    whole = flatten(init([*table, *factors], seed=1, dtype=dtype))
    for path, t in whole.items():
        if path.endswith("lora_b"):
            t += 0.1
        t.requires_grad_(not lora or "lora" in path)
    return whole


def loss(tree: dict[str, Tensor], recompute: Recompute = "none", every: int = 1) -> Tensor:
    config = replace(MODEL, lora_scale=0.5)
    return forward(unflatten(tree), TOKENS, config, recompute=recompute, recompute_every=every).float().square().mean()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_mode_changes_a_bit_of_the_loss_or_a_gradient(dtype: torch.dtype, lora: bool) -> None:
    plain = leaves(dtype, lora)
    expected = loss(plain)
    expected.backward()
    for mode, every in MODES:
        again = leaves(dtype, lora)
        found = loss(again, mode, every)
        found.backward(retain_graph=True)
        assert torch.equal(found, expected)
        for path, leaf in plain.items():
            assert (leaf.grad is None) == (again[path].grad is None) == (not leaf.requires_grad)
            assert leaf.grad is None or torch.equal(leaf.grad, again[path].grad), (mode, every, path)
        found.backward()  # a second backward pass computes again what the first one did
        assert all(t.grad is None or torch.equal(t.grad, plain[path].grad * 2) for path, t in again.items())


def kept(recompute: Recompute, every: int = 1) -> float:
    """Numbers that a layer keeps for each token, the mean over layers."""
    tree = leaves()

    def bytes_of(mode: Recompute, layers: int) -> int:
        few = {path: t for path, t in tree.items() if not path.startswith("layers.") or int(path.split(".")[1]) < layers}
        with torch.profiler.profile(profile_memory=True) as profile:
            held = loss(few, mode, every)
        assert held.requires_grad
        return sum(event.self_cpu_memory_usage for event in profile.events())

    return (bytes_of(recompute, 4) - bytes_of(recompute, 2)) / 4 / TOKENS.numel() / 2


def test_what_a_layer_keeps_for_each_token() -> None:
    D, F, H = MODEL.hidden_size, MODEL.intermediate_size, MODEL.num_heads
    whole = 8 * D + 3 * F + H + 2  # and the softmax's log-sum-exp and the norms' scales
    assert kept("none") == pytest.approx(whole, rel=0.02)
    assert kept("none") - kept("selective") == pytest.approx(2 * D + F, abs=1)
    assert kept("full") == pytest.approx(D, abs=1)
    assert kept("full", every=2) == pytest.approx((kept("none") + kept("full")) / 2, abs=1)


def test_selective_does_no_matrix_product_and_no_attention_twice() -> None:
    def work(mode: Recompute) -> dict[str, int]:
        with torch.profiler.profile() as profile:
            loss(leaves(), mode).backward()
        return {e.key: e.count for e in profile.key_averages() if e.key == "aten::mm" or "flash_attention" in e.key}

    assert work("selective") == work("none") != work("full")


def test_a_tensor_that_takes_the_place_of_one_that_is_gone_is_kept() -> None:
    x, memory = torch.ones(6, requires_grad=True), torch.full((6,), 2.0)
    with recomputing() as again:
        first = again(memory[:], lambda x: x * 2, x)
        del first
        memory.fill_(4.0)
        z = (x * memory[:]).sum()
    z.backward()
    assert x.grad is not None and x.grad.eq(4).all()


def test_the_first_use_makes_a_tensor_and_the_last_one_lets_it_go() -> None:
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(1)
        return x * 2

    x = torch.ones(5, 3, requires_grad=True)
    with recomputing() as again:
        y = again(double(x.detach()).requires_grad_(), double, x)
        z = (y.sin() * y).sum() + (y.flatten() ** 2).sum()  # views are let go too
    z.backward()
    assert len(calls) == 2
    expected = (2.0 * x.detach()).requires_grad_()
    ((expected.sin() * expected).sum() + (expected**2).sum()).backward()
    assert y.grad is not None and torch.equal(y.grad, expected.grad)
