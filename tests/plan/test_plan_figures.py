"""The plan's figures: published runs from one efficiency, parameters and FLOPs as published, times and layouts that add up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pyalpaca.model import LlamaConfig
from pyalpaca.plan import DEVICES, EFFICIENCY, Job, known_tflops, make_plan, search, teraflops

LLAMA_13B = LlamaConfig(49954, 5120, 13824, 40, 40, 40, 128)
LLAMA_7B = LlamaConfig(49954, 4096, 11008, 32, 32, 32, 128)
PUBLISHED = Job(LLAMA_13B, dp=8, zero=2, micro_batch=4, global_batch=256, seq=256, recompute="full")
TP4_PP2 = Job(LLAMA_13B, tp=4, pp=2, micro_batch=2, global_batch=16, seq=2048, recompute="full")
# What was published of the fastest 13B says its layout and that recomputation was trimmed. The rest is as usual for LLaMA 2:
# its 4096 tokens, one sample at a time, 256 samples a step; what lies between matrix products computed again; ZeRO-1.
FASTEST = Job(
    replace(LLAMA_13B, vocab_size=32000), pp=2, dp=8, global_batch=256, seq=4096, recompute="selective", zero=1, dtype="bf16"
)


@pytest.mark.parametrize(
    ("job", "device", "tokens_per_second"),
    [
        pytest.param(PUBLISHED, "ascend910b2", 1556.77, id="13B dp8 ZeRO-2 on Ascend"),
        pytest.param(PUBLISHED, "a100", 1493.73, id="13B dp8 ZeRO-2 on A100"),
        pytest.param(FASTEST, "ascend910b2", 2562.0, id="13B pp2 dp8 on Ascend"),
    ],
)
def test_published_runs_are_met_within_5_percent_by_one_efficiency(job: Job, device: str, tokens_per_second: float) -> None:
    plan = make_plan(job, DEVICES[device])
    assert plan.efficiency == EFFICIENCY
    assert plan.tokens_per_second == pytest.approx(tokens_per_second, rel=0.05)


def test_the_published_tflops_follow_from_the_published_throughput() -> None:
    padded = replace(LLAMA_13B, vocab_size=50048)
    for tokens_per_second, published in ((1556.77, 160.41), (1493.73, 153.91)):
        seconds = 256 * 256 / 8 / tokens_per_second
        assert teraflops(4, 256, 256, padded, seconds, 8) == pytest.approx(published, abs=0.01)


def test_hfu_counts_what_is_computed_twice_and_mfu_does_not() -> None:
    for every, share in ((1, 4 / 3), (2, 3.5 / 3)):
        plan = make_plan(replace(PUBLISHED, recompute_every=every), DEVICES["a100"])
        assert plan.hfu / plan.mfu == pytest.approx(share)
    for how in ("none", "selective"):
        plan = make_plan(replace(PUBLISHED, recompute=how), DEVICES["a100"])
        assert plan.hfu == plan.mfu
    assert plan.hfu == pytest.approx(plan.tflops / 312)


def test_the_published_recipe_fits_its_devices_and_a_full_13b_on_one_does_not() -> None:
    assert make_plan(TP4_PP2, DEVICES["ascend910b2"]).fits and make_plan(PUBLISHED, DEVICES["ascend910b2"]).fits
    assert not make_plan(replace(TP4_PP2, tp=1, pp=1), DEVICES["ascend910b2"]).fits
    assert not make_plan(replace(PUBLISHED, zero=0), DEVICES["a100"]).fits


@pytest.mark.parametrize(("vocab", "trained"), [(49953, 429_203_456), (49954, 429_211_648)])
def test_lora_with_embedding_and_head_trains_the_published_number_of_parameters(vocab: int, trained: int) -> None:
    job = Job(replace(LLAMA_7B, vocab_size=vocab), lora_r=8)
    assert make_plan(job, DEVICES["a100"]).stages[0].trainable == trained
    assert make_plan(replace(job, lora_full=()), DEVICES["a100"]).stages[0].trainable == 19_988_480


def test_each_device_holds_its_share() -> None:
    whole = make_plan(replace(TP4_PP2, tp=1, pp=1), DEVICES["a100"]).stages[0]
    stages = make_plan(TP4_PP2, DEVICES["a100"]).stages
    assert [stage.layers for stage in stages] == [20, 20]
    replicated = 81 * 5120  # norms
    assert 4 * sum(stage.parameters for stage in stages) == pytest.approx(whole.parameters + 3 * replicated, abs=4 * 5120 * 4)
    assert stages[0].memory.weights == 2 * stages[0].parameters
    assert stages[0].memory.gradients == 4 * stages[0].parameters  # fp32 sums
    assert stages[0].memory.optimizer == 12 * stages[0].parameters  # master, two moments


def test_zero_shares_optimizer_then_gradients_then_weights() -> None:
    plans = [make_plan(replace(PUBLISHED, zero=z), DEVICES["a100"]).stages[0].memory for z in range(4)]
    assert plans[1].optimizer == pytest.approx(plans[0].optimizer / 8, rel=1e-3)
    assert plans[2].gradients < plans[1].gradients / 2
    assert plans[3].weights == pytest.approx(plans[2].weights / 8, rel=1e-3)


def test_the_bubble_is_that_of_theory_where_stages_are_equal_and_grows_where_they_are_not() -> None:
    small_head = replace(LLAMA_13B, vocab_size=64)
    job = Job(small_head, pp=4, global_batch=12, seq=512)
    even = make_plan(job, DEVICES["ascend910b2"])
    assert even.bubble == pytest.approx(3 / (12 + 3), rel=0.01)
    uneven = make_plan(replace(job, layers=(7, 11, 11, 11)), DEVICES["ascend910b2"])
    assert uneven.bubble > even.bubble and uneven.seconds > even.seconds
    zero_bubble = make_plan(replace(job, schedule="zb-h1"), DEVICES["ascend910b2"])
    assert zero_bubble.bubble < even.bubble / 2 and zero_bubble.seconds < even.seconds
    interleaved = make_plan(replace(job, schedule="interleaved", chunks=2), DEVICES["ascend910b2"])
    assert interleaved.bubble == pytest.approx(3 / (24 + 3), rel=0.01)


def test_earlier_stages_of_1f1b_hold_more_micro_batches() -> None:
    plan = make_plan(Job(LLAMA_7B, pp=4, global_batch=8, recompute="full"), DEVICES["ascend910b2"])
    assert [stage.micro_batches for stage in plan.stages] == [4, 3, 2, 1]
    assert plan.stages[0].memory.activations == pytest.approx(4 / 3 * plan.stages[1].memory.activations)


def test_gradients_between_nodes_take_longer_than_within_one() -> None:
    def reduction(tp: int) -> float:
        """Seconds that a second data-parallel rank adds to a step of the same work for each."""
        one, two = (make_plan(Job(LLAMA_7B, tp=tp, dp=n, global_batch=16 * n), DEVICES["ascend910b2"]) for n in (1, 2))
        return two.seconds - one.seconds

    gigabytes = 4 * 6.885e9 / 2 / 1e9  # of fp32 gradients on a device at tp 2, each sent once by a ring of 2
    assert reduction(2) == pytest.approx(gigabytes / 196 / EFFICIENCY, rel=0.03)
    # Half as much on a device at tp 4, a quarter at 8, whose second rank is on another node.
    assert reduction(4) == pytest.approx(reduction(2) / 2, rel=0.01)
    assert reduction(8) == pytest.approx(reduction(4) / 2 * 196 / 25, rel=0.01)


def test_a_search_finds_only_what_fits_the_fastest_first() -> None:
    device = DEVICES["ascend910b2"]
    found = search(replace(TP4_PP2, tp=1, pp=1, dp=8), device)
    assert found and all(plan.fits and plan.job.devices == 8 and plan.job.global_batch == 16 for plan in found)
    assert [plan.seconds for plan in found] == pytest.approx(sorted(plan.seconds for plan in found), abs=1e-4)
    assert found[0].seconds < make_plan(TP4_PP2, device).seconds
    assert len({(p.job.tp, p.job.pp, p.job.dp) for p in found}) > 3
    assert not search(replace(TP4_PP2, tp=1, pp=1, micro_batch=1, global_batch=1), device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tp": 3}, "40 heads can't be cut in 3 equal parts"),
        ({"pp": 41}, "40 layers can't fill 41 pipeline stages"),
        ({"global_batch": 15}, "global batch 15 is not a multiple of micro batch 2 x data-parallel 1"),
        ({"zero": 2}, "ZeRO-2 is DeepSpeed's, which is data-parallel only; set tp, cp, pp to 1"),
        ({"zero": 4}, "zero is 4, expected one of 0, 1, 2, 3"),
        ({"layers": (10, 20)}, "layers per stage 10,20 are 30 on 2 stages, expected 40 on 2"),
        ({"schedule": "interleaved"}, "interleaved wants 2 or more"),
        ({"tp": 1, "sequence_parallel": True}, "sequence parallelism cuts between tensor-parallel ranks, and tp is 1"),
        ({"lora_r": 8, "lora_targets": ("q",)}, "LoRA target q matches no projection"),
        ({"lora_r": 8, "lora_full": ("lm_heads",)}, "lora_full names 'lm_heads', but the model has no such module; it has"),
        ({"seq": 0}, "seq is 0, expected at least 1"),
    ],
)
def test_what_cannot_be_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TP4_PP2, **change)


def test_devices_are_known_by_the_names_their_drivers_give() -> None:
    names = {"Ascend910B2": 354, "Ascend910B1": 364, "Ascend910B3": 295, "Ascend910B4": 246, "NVIDIA A100-SXM4-80GB": 312}
    for name, peak in names.items():
        found = known_tflops(name)
        assert found is not None and round(found) == peak
    assert known_tflops("Intel Xeon") is None
