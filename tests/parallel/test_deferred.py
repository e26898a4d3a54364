"""Weight gradients put off: when they come, and that not one bit of them differs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyalpaca.model import LlamaConfig, Recompute, Tree, flatten, forward, init, lora_parameters, parameters, unflatten
from pyalpaca.parallel.deferred import Deferred, give

MODEL = LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, norm_eps=1e-5
)
TOKENS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))


def leaves(dtype: torch.dtype, lora: bool) -> dict[str, Tensor]:
    table = parameters(MODEL)
    factors = lora_parameters(table, 2, ["q_proj", "down_proj"]) if lora else []
    whole = flatten(init([*table, *factors], seed=1, dtype=dtype))
    learn = {p.path for p in factors} or set(whole)
    for path, t in whole.items():
        if path.endswith("lora_b"):
            t.fill_(0.1)
        t.requires_grad_(path in learn)
    return whole


def backward(tree: Tree, recompute: Recompute) -> None:
    forward(tree, TOKENS, replace(MODEL, lora_scale=0.5), recompute=recompute).float().square().mean().backward()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_put_off_are_those_of_the_plain_backward_to_the_bit(
    dtype: torch.dtype, lora: bool, recompute: Recompute
) -> None:
    plain, split, deferred = leaves(dtype, lora), leaves(dtype, lora), Deferred()
    tree = deferred.wrap(unflatten(split))
    for _ in range(2):  # gradients add up over micro-batches
        backward(unflatten(plain), recompute)
        backward(tree, recompute)
        give(deferred.take())
    for path, leaf in plain.items():
        found, expected = split[path].grad, leaf.grad
        assert (found is None) == (expected is None) == (not leaf.requires_grad), path
        if found is not None and expected is not None:
            assert torch.equal(found, expected), path


def test_a_projection_has_no_gradient_before_its_notes_are_worked_off_and_one_after() -> None:
    split, deferred, arrived = leaves(torch.float32, False), Deferred(), []
    for path, leaf in split.items():
        leaf.register_post_accumulate_grad_hook(lambda _, path=path: arrived.append(path))
    backward(deferred.wrap(unflatten(split)), "none")
    linear = {path for path in split if path.endswith("weight") or path == "head"}
    assert set(arrived) == set(split) - linear
    notes = deferred.take()
    assert len(notes) == len(linear) and not deferred.take()
    give(notes)
    assert sorted(arrived) == sorted(split)


def count(profile: torch.profiler.profile) -> int:
    """Products of gradients: our operators, which may call torch's, or torch's alone, as the backend has it."""
    calls = {event.key: event.count for event in profile.key_averages()}
    ours = sum(calls.get(f"pyalpaca::{name}", 0) for name in ("linear_dx", "linear_dweight"))
    return ours or calls.get("aten::mm", 0)


def test_the_first_half_does_not_multiply_for_the_weights() -> None:
    def products(deferred: Deferred | None) -> tuple[int, int]:
        whole = leaves(torch.float32, False)
        tree = deferred.wrap(unflatten(whole)) if deferred else unflatten(whole)
        y = forward(tree, TOKENS, MODEL).sum()
        with torch.profiler.profile() as first:
            y.backward()
        with torch.profiler.profile() as second:
            if deferred:
                give(deferred.take())
        return count(first), count(second)

    linear = 7 * MODEL.num_layers + 1
    assert products(None) == (2 * linear, 0)
    assert products(Deferred()) == (linear, linear)


def test_a_leaf_used_otherwise_than_by_a_linear_layer_has_its_gradient_at_once() -> None:
    leaf, deferred = torch.ones(3, 3, requires_grad=True), Deferred()
    weight = deferred.wrap({"w": leaf})["w"]

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return 2 * x.detach()

        @staticmethod
        def backward(ctx: object, *grads: Tensor) -> Tensor:
            return 2 * grads[0]

    (weight @ torch.eye(3) + torch.stack([weight, weight]).sum(0) + Double.apply(weight)).sum().backward()
    assert not deferred.take()
    assert leaf.grad is not None and leaf.grad.eq(5).all()
