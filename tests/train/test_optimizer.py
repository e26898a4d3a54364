"""The optimizer against torch.optim.AdamW and torch's own clipping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyalpaca.model import Parameter
from pyalpaca.parallel import Mesh
from pyalpaca.train import TrainConfig
from pyalpaca.train.optimizer import gradient_norm, init_optimizer, update

MESH = Mesh(torch.device("cpu"))


def tree(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in (("head", (7, 5)), ("norm", (5,)))}


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {"head": torch.randn(7, 5, generator=generator), "norm": torch.randn(5, generator=generator)}


def torchs(weights: dict[str, Tensor], config: TrainConfig, decayed: set[str]) -> list[dict[str, Tensor]]:
    """The weights after each of five steps of torch.optim.AdamW, in fp32."""
    own = {name: torch.nn.Parameter(w.float().clone()) for name, w in weights.items()}
    groups = [{"params": [p], "weight_decay": config.weight_decay if name in decayed else 0.0} for name, p in own.items()]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(config.beta1, config.beta2), eps=config.eps, foreach=False)
    seen = []
    for step in range(5):
        for name, p in own.items():
            p.grad = gradients(step)[name]
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.step()
        seen.append({name: p.detach().clone() for name, p in own.items()})
    return seen


@pytest.mark.parametrize("decay_norms", [False, True])
def test_equals_torchs_adamw_with_its_decay_groups(decay_norms: bool) -> None:
    config = TrainConfig(weight_decay=0.3, beta2=0.95, decay_norms=decay_norms)
    weights = tree()
    state = init_optimizer(weights)
    assert not state.master
    for step, expected in enumerate(torchs(tree(), config, {"head", "norm"} if decay_norms else {"head"})):
        update(weights, gradients(step), state, step, 0.1 / (step + 1), config)
        for name in weights:
            torch.testing.assert_close(weights[name], expected[name], atol=1e-6, rtol=1e-6)


def test_narrow_weights_follow_their_fp32_masters() -> None:
    config = TrainConfig(weight_decay=0.3, dtype="bf16")
    weights = tree(torch.bfloat16)
    state = init_optimizer(weights)
    for step, expected in enumerate(torchs(tree(torch.bfloat16), config, {"head"})):
        update(weights, gradients(step), state, step, 0.1 / (step + 1), config)
        for name in weights:
            torch.testing.assert_close(state.master[name], expected[name], atol=1e-6, rtol=1e-6)
            assert weights[name].dtype == torch.bfloat16
            assert torch.equal(weights[name], state.master[name].bfloat16())


def test_steps_too_small_for_bf16_add_up_in_the_master() -> None:
    weights = {"head": torch.ones(2, 2, dtype=torch.bfloat16)}
    state, config = init_optimizer(weights), TrainConfig(weight_decay=0.0)
    for step in range(40):
        update(weights, {"head": torch.ones(2, 2)}, state, step, 1e-4, config)
    assert torch.equal(weights["head"], (torch.ones(2, 2) - 40e-4).bfloat16())


def test_the_gradient_norm_counts_what_every_rank_holds_once() -> None:
    table = {"head": Parameter("head", "lm_head.weight", (7, 5), 0), "norm": Parameter("norm", "model.norm.weight", (5,), None)}
    grads = gradients(0)
    both = torch.cat([grads["head"].flatten(), grads["norm"]]).norm()
    torch.testing.assert_close(gradient_norm(grads, table, MESH), both)
    second = Mesh(torch.device("cpu"), tp=2, rank=1)  # no group: nothing is added
    torch.testing.assert_close(gradient_norm(grads, table, second), grads["head"].norm())
