"""Every schedule, interpreted in several processes, gives the losses and the weights of one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from launch import launch
from torch import Tensor
from workers import descend

from pyalpaca.model import LlamaConfig, flatten, forward, init, parameters, shard, unflatten, whole_slice

MODEL = LlamaConfig(
    vocab_size=157, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=8, norm_eps=1e-5
)


@cache
def plain(model: LlamaConfig) -> tuple[list[float], dict[str, Tensor]]:
    """The same descent with nothing of the parallel room: torch's own loss and backward over the whole batch."""
    weights = flatten(init(parameters(model), 7))
    losses = []
    for step in range(3):
        text = torch.randint(model.vocab_size, (4, 2, 12), generator=torch.Generator().manual_seed(step)).flatten(0, 1)
        leaves = {path: w.requires_grad_() for path, w in weights.items()}
        logits = forward(unflatten(leaves), text[:, :-1], model)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        found = torch.autograd.grad(loss, list(leaves.values()))
        losses.append(loss.item())
        weights = {path: (w - g).detach() for (path, w), g in zip(leaves.items(), found, strict=True)}
    return losses, weights


@pytest.mark.parametrize(
    ("name", "settings", "model"),
    [
        pytest.param("1f1b", {"pp": 2, "counts": (1, 3)}, MODEL, id="uneven"),
        pytest.param("interleaved", {"pp": 2, "chunks": 2}, MODEL, id="interleaved pp2"),
        pytest.param(
            "interleaved", {"pp": 2, "chunks": 2, "counts": (1, 2, 1, 1)}, replace(MODEL, num_layers=5), id="interleaved uneven"
        ),
        pytest.param("zb-h1", {"pp": 2}, MODEL, id="zb-h1 pp2"),
        pytest.param("zb-h1", {"pp": 2, "tp": 2, "sequence_parallel": True}, MODEL, id="zb-h1 tp2 pp2 sp"),
        pytest.param("interleaved", {"pp": 2, "chunks": 2, "tp": 2}, MODEL, id="interleaved tp2 pp2"),
        pytest.param("zb-h1", {"pp": 4}, MODEL, id="zb-h1 pp4", marks=pytest.mark.long),
        pytest.param(
            "interleaved", {"pp": 4, "chunks": 2}, replace(MODEL, num_layers=8), id="interleaved pp4", marks=pytest.mark.long
        ),
    ],
)
def test_losses_and_weights_equal_those_of_one_process(name: str, settings: dict[str, Any], model: LlamaConfig) -> None:
    tp, pp = settings.get("tp", 1), settings.get("pp", 1)
    losses, weights = plain(model)
    table, seen = {p.path: p for p in parameters(model)}, set()
    for rank, (found, mine) in enumerate(launch(tp * pp, descend, name, model, *arguments(settings))):
        if rank // tp == pp - 1:
            torch.testing.assert_close(found, losses, atol=1e-5, rtol=1e-5)
        for path, w in mine.items():
            expected = whole_slice(weights[path], shard(table[path], rank % tp, tp))
            torch.testing.assert_close(w, expected, atol=1e-5, rtol=1e-5)
        seen |= set(mine)
    assert seen == set(table)


def arguments(settings: dict[str, Any]) -> list[Any]:
    defaults = {"tp": 1, "pp": 1, "chunks": 1, "counts": (), "sequence_parallel": False}
    return list({**defaults, **settings}.values())
