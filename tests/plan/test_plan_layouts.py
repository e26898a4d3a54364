"""In every layout the bytes that each rank moves are those of the formula, to the byte, and the memory is as planned."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from launch import launch
from plan_workers import Observed, layout_steps

from pyalpaca.model import LlamaConfig
from pyalpaca.parallel import Traffic
from pyalpaca.plan import DEVICES, make_plan, traffic
from pyalpaca.train import TrainConfig
from pyalpaca.train.fit import planned_job

# A vocabulary that nothing divides, grouped heads, samples of a length that no number of ranks divides.
MODEL = LlamaConfig(157, 64, 96, 4, 8, 4, 8, norm_eps=1e-5)
RUN = TrainConfig(micro_batch_size=2, global_batch_size=8, seq_length=51)
LORA = replace(RUN, lora_r=4)
FROZEN = replace(RUN, lora_r=4, lora_full="", lora_targets="q_proj,o_proj,down_proj")

CASES: dict[str, tuple[int, TrainConfig]] = {
    "tp2": (2, replace(RUN, tp=2)),
    "tp2 full": (2, replace(RUN, tp=2, recompute="full")),
    "tp2 full in 1 of 2": (2, replace(RUN, tp=2, recompute="full", recompute_every=2, dtype="bf16")),
    "tp2 lora": (2, replace(LORA, tp=2)),
    "tp2 frozen ends": (2, replace(FROZEN, tp=2, recompute="full")),
    "tp2 sp": (2, replace(RUN, tp=2, sequence_parallel=True)),
    "tp2 sp full": (2, replace(RUN, tp=2, recompute="full", sequence_parallel=True)),
    "tp2 sp selective lora": (2, replace(LORA, tp=2, recompute="selective", sequence_parallel=True)),
    "tp2 sp frozen ends": (2, replace(FROZEN, tp=2, sequence_parallel=True)),
    "pp2": (2, replace(RUN, pp=2, dtype="bf16")),
    "dp2": (2, RUN),
    "dp2 zero1": (2, replace(RUN, zero=1, dtype="bf16")),
    "dp2 zero1 small buckets": (2, replace(RUN, zero=1, bucket_size=5000)),
    "cp2": (2, replace(RUN, cp=2)),
    "cp2 full": (2, replace(RUN, cp=2, recompute="full", dtype="bf16")),
    "cp2 zero1": (2, replace(RUN, cp=2, zero=1)),
    "pp2 interleaved": (2, replace(RUN, pp=2, schedule="interleaved", virtual_stages=2)),
    "pp2 zb-h1": (2, replace(RUN, pp=2, schedule="zb-h1")),
    "pp2 uneven": (2, replace(RUN, pp=2, layers_per_stage="3,1", recompute="selective")),
    "tp4": (4, replace(RUN, tp=4)),
    "tp4 sp": (4, replace(RUN, tp=4, sequence_parallel=True)),
    "pp4": (4, replace(RUN, pp=4, micro_batch_size=1)),
    "pp4 zb-h1": (4, replace(RUN, pp=4, schedule="zb-h1", micro_batch_size=1)),
    "tp2 pp2": (4, replace(RUN, tp=2, pp=2, recompute="full")),
    "tp2 pp2 sp": (4, replace(RUN, tp=2, pp=2, sequence_parallel=True)),
    "tp2 dp2 zero1 lora": (4, replace(LORA, tp=2, zero=1)),
    "pp2 dp2": (4, replace(RUN, pp=2)),
    "tp2 cp2": (4, replace(RUN, tp=2, cp=2)),
}


@cache
def measured(world: int) -> dict[str, list[tuple[Traffic, Observed]]]:
    """{case: what each rank found}: all cases of a world in one start of its processes."""
    names = [name for name, (size, _) in CASES.items() if size == world]
    ranks = launch(world, layout_steps, [(CASES[name][1], MODEL) for name in names])
    return {name: [found[i] for found in ranks] for i, name in enumerate(names)}


@pytest.mark.parametrize("name", CASES)
def test_every_rank_moves_the_bytes_of_the_formula(name: str) -> None:
    world, config = CASES[name]
    replicas = world // config.tp // config.pp
    plan = planned_job(config, MODEL, replicas, config.zero)
    for rank, (moved, _) in enumerate(measured(world)[name]):
        stage, replica, tp_rank = rank // (config.tp * replicas), rank // config.tp % replicas, rank % config.tp
        assert moved == traffic(plan, stage, tp_rank, replica), f"rank {rank}"
        assert sum(moved.values()) > 0


@pytest.mark.parametrize("name", CASES)
def test_every_stage_takes_the_memory_that_was_planned(name: str) -> None:
    world, config = CASES[name]
    replicas = world // config.tp // config.pp
    stages = make_plan(planned_job(config, MODEL, replicas, config.zero), DEVICES["ascend910b2"]).stages
    for stage, planned in enumerate(stages):
        ranks = measured(world)[name][stage * config.tp * replicas : (stage + 1) * config.tp * replicas]
        most = max(found.peak for _, found in ranks)
        assert planned.memory.total == pytest.approx(most, rel=0.1), f"stage {stage}"
