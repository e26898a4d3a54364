"""One step: clipping, losses that are not finite, fp16 overflows, and what learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from launch import launch
from torch import Tensor
from train_makers import MODEL

from pyalpaca.checkpoint import memory_reader
from pyalpaca.model import flatten, init, parameters
from pyalpaca.parallel import Mesh, init_mesh
from pyalpaca.train import TrainConfig
from pyalpaca.train.finite import first_bad, forward_place
from pyalpaca.train.loop import plan, start
from pyalpaca.train.schedule import LossScale
from pyalpaca.train.step import Setup, TrainState, gradients, train_step

CONFIG = TrainConfig(lr=1e-2, global_batch_size=4, micro_batch_size=2, seq_length=12, steps=10, weight_decay=0.0, clip=0.0)


def begin(config: TrainConfig, **damage: float) -> tuple[TrainState, Setup]:
    """A state at step 0; `damage` is written into the first element of the tensors it names."""
    fresh = flatten(init(parameters(MODEL), seed=3))
    for path, value in damage.items():
        fresh[path].view(-1)[0] = value
    setup = plan(MODEL, config, Mesh(torch.device("cpu")))
    reader = memory_reader(MODEL, {p.name: fresh[p.path] for p in parameters(MODEL)})
    return start(config, setup, reader), setup


def data(micro_batches: int = 2) -> tuple[Tensor, Tensor]:
    text = torch.randint(MODEL.vocab_size, (micro_batches, 2, 13), generator=torch.Generator().manual_seed(1))
    labels = text[..., 1:].clone()
    labels[0, :, :5] = -100
    return text[..., :-1], labels


def weights(state: TrainState) -> dict[str, Tensor]:
    return {path: t.clone() for path, t in flatten(state.params).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[path], b[path]) for path in a)


def test_the_loss_is_the_mean_over_tokens_whatever_the_micro_batches() -> None:
    state, setup = begin(CONFIG)
    tokens, labels = data()
    grads, loss = gradients(state.params, tokens, labels, 1.0, setup)
    together, whole = gradients(state.params, tokens.reshape(1, 4, 12), labels.reshape(1, 4, 12), 1.0, setup)
    torch.testing.assert_close(loss, whole)
    for path in grads:
        torch.testing.assert_close(grads[path], together[path])


def test_gradients_that_nothing_is_added_to_stay_as_narrow_as_the_weights_and_sums_are_wide() -> None:
    state, setup = begin(replace(CONFIG, dtype="bf16"))
    tokens, labels = data()
    summed, _ = gradients(state.params, tokens, labels, 1.0, setup)
    alone, _ = gradients(state.params, tokens[:1], labels[:1], 1.0, setup)
    assert {g.dtype for g in summed.values()} == {torch.float32} and {g.dtype for g in alone.values()} == {torch.bfloat16}


def test_a_batch_without_a_label_is_zero_not_nan() -> None:
    state, setup = begin(CONFIG)
    tokens, labels = data()
    grads, loss = gradients(state.params, tokens, torch.full_like(labels, -100), 1.0, setup)
    assert loss == 0 and all(not g.any() for g in grads.values())


def test_gradients_are_clipped_as_torch_clips_them() -> None:
    # With eps far above the gradients, AdamW's first step is proportional to them.
    config = replace(CONFIG, clip=0.1, eps=1e6, lr=1e6)
    state, setup = begin(config)
    tokens, labels = data()
    before = weights(state)
    grads, _ = gradients(state.params, tokens, labels, 1.0, setup)
    holders = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
    for holder, g in zip(holders, grads.values(), strict=True):
        holder.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(holders, 0.1)
    assert norm > 0.1
    rate = train_step(state, tokens, labels, setup)[1]
    assert rate.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    share = rate.learning_rate / config.eps
    for path, holder in zip(grads, holders, strict=True):
        torch.testing.assert_close(before[path] - flatten(state.params)[path], holder.grad * share, atol=1e-6, rtol=1e-3)


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_step_and_tensor() -> None:
    state, setup = begin(CONFIG, head=float("nan"))
    before = weights(state)
    with pytest.raises(
        FloatingPointError, match=r"step 1: loss nan, gradient norm nan; .* the weight lm_head.weight\. .*--on-nan"
    ):
        train_step(state, *data(), setup)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(state).values(), strict=True) if not a.isnan().any())


def diverge() -> str:
    """A head that is not a number, on the second of two pipeline stages; what each rank says."""
    fresh = flatten(init(parameters(MODEL), seed=3))
    fresh["head"][0, 0] = float("nan")
    setup = plan(MODEL, replace(CONFIG, lora_r=2, lora_full="lm_head"), init_mesh(pp=2))
    state = start(setup.config, setup, memory_reader(MODEL, {p.name: fresh[p.path] for p in parameters(MODEL)}))
    try:
        train_step(state, *data(), setup)
    except FloatingPointError as error:
        return str(error)
    return "went on"


def test_every_rank_names_the_same_tensor() -> None:
    first, second = launch(2, diverge)
    assert first == second and "the first tensor that is not finite is the weight lm_head.weight. " in first


def test_the_first_bad_gradient_is_the_first_of_the_forward_pass() -> None:
    state, setup = begin(replace(CONFIG, lora_r=2))
    grads = {path: torch.zeros(1) for path in weights(state)}
    for path in ("layers.1.attention.q.lora_b", "layers.1.attention_norm", "layers.0.ffn_norm", "head"):
        grads[path] = torch.tensor([float("inf")])
    assert first_bad(state.params, grads, setup.table) == (
        "the first tensor that is not finite is the gradient of model.layers.0.post_attention_layernorm.weight "
        f"(4 of {len(grads)} gradients are so, the last that of lm_head.weight)"
    )
    names = [place[2] for place in sorted(forward_place(p.name) for p in setup.table.values())]
    assert names[:4] == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        *(f"model.layers.0.self_attn.q_proj.{x}.weight" for x in ("lora_A", "lora_B")),
    ]
    assert names[-3:] == ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"]


def test_gradients_that_are_finite_may_have_a_norm_that_is_not() -> None:
    state, setup = begin(CONFIG)
    assert first_bad(state.params, {"head": torch.ones(1)}, setup.table) == "every gradient is finite, but not their norm"


def test_on_nan_skip_leaves_the_weights_counts_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    state, setup = begin(replace(CONFIG, on_nan="skip", lora_r=2, lora_full=""), norm=float("inf"))
    before = weights(state)
    new, metrics = train_step(state, *data(), setup)
    assert same(before, weights(new))
    assert not any(m.any() for m in new.optimizer.exp_avg.values())
    assert (new.step, new.updates, new.nan_steps, new.samples) == (1, 0, 1, 4)
    assert metrics.skipped and metrics.loss != metrics.loss
    said = capsys.readouterr().err
    assert said.startswith("warning: step 1: loss nan") and "norm.weight; this step is left out" in said


def test_an_fp16_overflow_is_skipped_halves_the_scale_and_does_not_advance_the_rate() -> None:
    config = replace(CONFIG, dtype="fp16", loss_scale=2.0**40, hysteresis=1, warmup_steps=5)
    state, setup = begin(config)
    before = weights(state)
    state, first = train_step(state, *data(), setup)
    assert first.skipped and first.loss == first.loss
    assert same(before, weights(state))
    assert (state.step, state.updates, state.nan_steps, state.loss_scale.value) == (1, 0, 0, 2.0**39)
    state, second = train_step(replace(state, loss_scale=LossScale(1024.0, 0, 1)), *data(), setup)
    assert second.learning_rate == first.learning_rate == pytest.approx(config.lr / 5)
    assert not second.skipped and state.updates == 1 and not same(before, weights(state))


def test_in_fp16_the_smallest_scale_ends_the_patience() -> None:
    config = replace(CONFIG, dtype="fp16", loss_scale=2.0, hysteresis=1)
    state, setup = begin(config, head=float("nan"))
    state, metrics = train_step(state, *data(), setup)
    assert metrics.skipped and state.loss_scale.value == 1.0
    with pytest.raises(FloatingPointError, match="step 2: loss nan"):
        train_step(state, *data(), setup)
    state, _ = train_step(state, *data(), replace(setup, config=replace(config, on_nan="skip")))
    assert (state.updates, state.nan_steps, state.loss_scale) == (0, 1, LossScale(1.0, 0, 0))


@pytest.mark.parametrize(("full", "more"), [("", set()), ("embed_tokens,lm_head", {"embed", "head"}), ("norm", {"norm"})])
def test_lora_trains_its_factors_and_what_lora_full_names(full: str, more: set[str]) -> None:
    state, setup = begin(replace(CONFIG, lora_r=2, lora_targets="q_proj,down_proj", lora_full=full))
    before = weights(state)
    for _ in range(2):  # A has no gradient before B has moved
        state, _ = train_step(state, *data(), setup)
    changed = {path for path, t in weights(state).items() if not torch.equal(t, before[path])}
    factors = {f"layers.{i}.{module}.lora_{x}" for i in range(2) for module in ("attention.q", "ffn.down") for x in "ab"}
    assert changed == factors | more == set(state.optimizer.exp_avg)


def test_settings_that_do_not_fit_the_model_or_the_mesh_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lora_full names 'wte', but the model has no such module; it has .*lm_head"):
        begin(replace(CONFIG, lora_r=2, lora_full="wte"))
    with pytest.raises(ValueError, match="query_key_value"):
        begin(replace(CONFIG, lora_r=2, lora_targets="query_key_value"))
    pipe = replace(CONFIG, pp=2, schedule="interleaved", virtual_stages=2, global_batch_size=6)
    with pytest.raises(ValueError, match="3 micro-batches can't be interleaved over 2 pipeline stages; choose a global batch"):
        plan(replace(MODEL, num_layers=4), pipe, Mesh(torch.device("cpu"), pp=2))
    with pytest.raises(ValueError, match="layers per stage 1,2 are 3 on 2 stages, expected 2 on 2"):
        plan(MODEL, replace(CONFIG, pp=2, layers_per_stage="1,2"), Mesh(torch.device("cpu"), pp=2))
    tied = replace(MODEL, tie_embeddings=True)
    with pytest.raises(ValueError, match="ties its embeddings"):
        plan(tied, CONFIG, Mesh(torch.device("cpu"), pp=2))
