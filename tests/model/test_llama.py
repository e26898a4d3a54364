"""The forward pass against transformers' LlamaForCausalLM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from twin import transformers_twin

from pyalpaca.model import (
    LayerCache,
    LlamaConfig,
    Recompute,
    flatten,
    forward,
    init,
    lora_parameters,
    parameters,
    stage_parameters,
    tree_map,
    unflatten,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "grouped-query": {},
    "multi-head": {"num_kv_heads": 4},
    "wide head": {"head_dim": 32},
    "tied": {"tie_embeddings": True},
    "theta": {"rope_theta": 500000.0},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3 rope": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
}


def tokens_of(config: LlamaConfig, *shape: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tiny: LlamaConfig, variant: str) -> None:
    config = replace(tiny, **VARIANTS[variant])
    params = init(parameters(config), seed=1)
    # Norm weights of 1 would hide a forgotten one.
    params = tree_map(lambda t: t if t.dim() > 1 else t + 0.1 * torch.arange(t.numel()).sin(), params)
    tokens = tokens_of(config, 2, 37)
    with torch.no_grad():
        expected = transformers_twin(config, params)(tokens).logits
        torch.testing.assert_close(forward(params, tokens, config), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_twenty_adamw_steps_give_the_losses_of_transformers(tiny: LlamaConfig, tiny_params, recompute: Recompute) -> None:
    twin = transformers_twin(tiny, tiny_params).train()
    leaves = {path: t.clone().requires_grad_() for path, t in flatten(tiny_params).items()}
    ours = torch.optim.AdamW(leaves.values(), lr=1e-3)
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    for step in range(20):
        tokens = torch.randint(tiny.vocab_size, (2, 17), generator=torch.Generator().manual_seed(step % 5))
        logits = forward(unflatten(leaves), tokens[:, :-1], tiny, recompute=recompute)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        expected = twin(tokens, labels=tokens).loss
        for optimizer, value in ((ours, loss), (theirs, expected)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)


def test_decoding_with_a_cache_gives_the_logits_of_one_pass(tiny: LlamaConfig, tiny_params) -> None:
    tokens = tokens_of(tiny, 2, 12)
    expected = forward(tiny_params, tokens, tiny)
    shape = (2, 12, tiny.num_kv_heads, tiny.head_dim)
    buffers = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(tiny.num_layers)]
    found, start = [], 0
    for length in (5, 1, 1, 3, 2):
        cache = [LayerCache(k, v, start) for k, v in buffers]
        found.append(forward(tiny_params, tokens[:, start : start + length], tiny, cache=cache))
        start += length
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-5, rtol=1e-5)


def test_pipeline_stages_compose_to_the_whole_model(tiny: LlamaConfig, tiny_params) -> None:
    tokens = tokens_of(tiny, 1, 9)
    x, flat = tokens, flatten(tiny_params)
    for stage in range(2):
        table = stage_parameters(parameters(tiny), tiny.num_layers, stage, 2)
        x = forward(unflatten({p.path: flat[p.path] for p in table}), x, tiny)
    torch.testing.assert_close(x, forward(tiny_params, tokens, tiny))


def test_lora_adds_nothing_at_first_and_then_what_the_merged_weight_would(tiny: LlamaConfig, tiny_params) -> None:
    table = lora_parameters(parameters(tiny), rank=4, targets=["q_proj", "down_proj"])
    factors = flatten(init(table, seed=2))
    config = replace(tiny, lora_scale=2.0)
    tokens = tokens_of(tiny, 1, 9)
    base = flatten(tiny_params)
    torch.testing.assert_close(forward(unflatten({**base, **factors}), tokens, config), forward(tiny_params, tokens, tiny))

    factors = {
        path: torch.randn(t.shape, generator=torch.Generator().manual_seed(i)) / 8 for i, (path, t) in enumerate(factors.items())
    }
    merged = dict(base)
    for path in factors:
        if path.endswith(".lora_a"):
            stem = path.removesuffix(".lora_a")
            merged[f"{stem}.weight"] = base[f"{stem}.weight"] + 2.0 * factors[f"{stem}.lora_b"] @ factors[path]
    torch.testing.assert_close(
        forward(unflatten({**base, **factors}), tokens, config), forward(unflatten(merged), tokens, tiny), atol=1e-4, rtol=1e-4
    )
