"""What a plan says of memory is what a real step of the runtime takes, counted storage by storage."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_workers import MANY_WORDS, WIDE, kept, observe

from pyalpaca.model import LlamaConfig
from pyalpaca.plan import make_plan
from pyalpaca.plan.devices import DEVICES
from pyalpaca.plan.estimate import Plan
from pyalpaca.train import TrainConfig
from pyalpaca.train.fit import planned_job

FULL = TrainConfig(micro_batch_size=2, global_batch_size=4, seq_length=192)
LORA = replace(FULL, lora_r=8)
NARROW_LORA = replace(FULL, lora_r=8, lora_full="", lora_targets="q_proj,v_proj", dtype="bf16")
PACKED = replace(FULL, pack=True)
MODES = [("none", 1), ("selective", 1), ("full", 1), ("full", 2), ("selective", 2)]
modes = pytest.mark.parametrize(("recompute", "every"), MODES)


def planned(config: TrainConfig, model: LlamaConfig) -> Plan:
    return make_plan(planned_job(config, model, 1, 0), DEVICES["ascend910b2"])


CASES = [
    pytest.param(WIDE, replace(config, recompute=recompute, recompute_every=every), id=f"{name} {recompute} {every}")
    for name, config in {"fp32": FULL, "bf16": replace(FULL, dtype="bf16"), "lora": LORA, "q, v": NARROW_LORA}.items()
    for recompute, every in MODES
]
CASES += [
    pytest.param(MANY_WORDS, config, id=f"many words {name}") for name, config in {"fp32": FULL, "q, v": NARROW_LORA}.items()
]
CASES += [
    pytest.param(model, replace(FULL, global_batch_size=2, recompute=how, **more), id=f"one micro-batch, {name} {how}")
    for name, model, more in (("fp32", WIDE, {}), ("bf16", WIDE, {"dtype": "bf16"}), ("many words", MANY_WORDS, {}))
    for how in ("none", "full")
]
CASES.append(pytest.param(replace(WIDE, tie_embeddings=True), FULL, id="tied"))


@pytest.mark.parametrize(("model", "config"), CASES)
def test_a_step_takes_the_memory_that_was_planned(model: LlamaConfig, config: TrainConfig) -> None:
    found, memory = observe(config, model), planned(config, model).stages[0].memory
    assert memory.weights + memory.optimizer == pytest.approx(found.before, rel=0.01)
    assert memory.total == pytest.approx(found.peak, rel=0.05)
    # And of what only the step itself takes.
    beside = memory.weights + memory.optimizer + memory.gradients
    assert memory.total - beside == pytest.approx(found.peak - beside, rel=0.1)


@pytest.mark.parametrize(
    "config", [FULL, replace(FULL, dtype="fp16"), LORA, NARROW_LORA, PACKED], ids=["fp32", "fp16", "lora", "q, v", "packed"]
)
@modes
def test_activations_are_what_a_forward_pass_leaves_behind(config: TrainConfig, recompute: str, every: int) -> None:
    config = replace(config, recompute=recompute, recompute_every=every)
    assert planned(config, WIDE).stages[0].memory.activations == pytest.approx(kept(config, WIDE), rel=0.03)


def test_more_recomputation_takes_less_memory_and_more_time() -> None:
    plans = [planned(replace(FULL, recompute=how, recompute_every=n), WIDE) for how, n in MODES[:3]]
    activations = [plan.stages[0].memory.activations for plan in plans]
    assert activations == sorted(activations, reverse=True) and len(set(activations)) == 3
    assert [plan.seconds for plan in plans] == sorted(plan.seconds for plan in plans)
