"""In every layout the bytes that each rank moves are those of the formula, to the byte, and the memory is as planned."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from launch import launch
from plan_workers import Observed, job, layout_steps

from pyalpaca.model import LlamaConfig
from pyalpaca.parallel import Traffic
from pyalpaca.plan import DEVICES, make_plan, traffic
from pyalpaca.train import TrainConfig

# A vocabulary that nothing divides, grouped heads, samples of a length that no number of ranks divides.
MODEL = LlamaConfig(157, 64, 96, 4, 8, 4, 8, norm_eps=1e-5)
RUN = TrainConfig(micro_batch_size=2, global_batch_size=8, seq_length=51)
LORA = replace(RUN, lora_r=4)
FROZEN = replace(RUN, lora_r=4, lora_full="", lora_targets="q_proj,o_proj,down_proj")

CASES: dict[str, tuple[int, TrainConfig, bool]] = {
    "tp2": (2, replace(RUN, tp=2), False),
    "tp2 full": (2, replace(RUN, tp=2, recompute="full"), False),
    "tp2 full in 1 of 2": (2, replace(RUN, tp=2, recompute="full", recompute_every=2, dtype="bf16"), False),
    "tp2 lora": (2, replace(LORA, tp=2), False),
    "tp2 frozen ends": (2, replace(FROZEN, tp=2, recompute="full"), False),
    "tp2 sp": (2, replace(RUN, tp=2), True),
    "tp2 sp full": (2, replace(RUN, tp=2, recompute="full"), True),
    "tp2 sp selective lora": (2, replace(LORA, tp=2, recompute="selective"), True),
    "tp2 sp frozen ends": (2, replace(FROZEN, tp=2), True),
    "pp2": (2, replace(RUN, pp=2, dtype="bf16"), False),
    "dp2": (2, RUN, False),
    "dp2 zero1": (2, replace(RUN, zero=1, dtype="bf16"), False),
    "dp2 zero1 small buckets": (2, replace(RUN, zero=1, bucket_size=5000), False),
    "cp2": (2, replace(RUN, cp=2), False),
    "cp2 full": (2, replace(RUN, cp=2, recompute="full", dtype="bf16"), False),
    "cp2 zero1": (2, replace(RUN, cp=2, zero=1), False),
    "tp4": (4, replace(RUN, tp=4), False),
    "tp4 sp": (4, replace(RUN, tp=4), True),
    "pp4": (4, replace(RUN, pp=4, micro_batch_size=1), False),
    "tp2 pp2": (4, replace(RUN, tp=2, pp=2, recompute="full"), False),
    "tp2 pp2 sp": (4, replace(RUN, tp=2, pp=2), True),
    "tp2 dp2 zero1 lora": (4, replace(LORA, tp=2, zero=1), False),
    "pp2 dp2": (4, replace(RUN, pp=2), False),
    "tp2 cp2": (4, replace(RUN, tp=2, cp=2), False),
}


@cache
def measured(world: int) -> dict[str, list[tuple[Traffic, Observed]]]:
    """{case: what each rank found}: all cases of a world in one start of its processes."""
    names = [name for name, (size, *_) in CASES.items() if size == world]
    ranks = launch(world, layout_steps, [(CASES[name][1], MODEL, CASES[name][2]) for name in names])
    return {name: [found[i] for found in ranks] for i, name in enumerate(names)}


@pytest.mark.parametrize("name", CASES)
def test_every_rank_moves_the_bytes_of_the_formula(name: str) -> None:
    world, config, sequence_parallel = CASES[name]
    replicas = world // config.tp // config.pp
    plan = job(config, MODEL, replicas // config.cp, sequence_parallel)
    for rank, (moved, _) in enumerate(measured(world)[name]):
        stage, replica, tp_rank = rank // (config.tp * replicas), rank // config.tp % replicas, rank % config.tp
        assert moved == traffic(plan, stage, tp_rank, replica), f"rank {rank}"
        assert sum(moved.values()) > 0


@pytest.mark.parametrize("name", CASES)
def test_every_stage_takes_the_memory_that_was_planned(name: str) -> None:
    world, config, sequence_parallel = CASES[name]
    replicas = world // config.tp // config.pp
    stages = make_plan(job(config, MODEL, replicas // config.cp, sequence_parallel), DEVICES["ascend910b2"]).stages
    for stage, planned in enumerate(stages):
        ranks = measured(world)[name][stage * config.tp * replicas : (stage + 1) * config.tp * replicas]
        most = max(found.peak for _, found in ranks)
        assert planned.memory.total == pytest.approx(most, rel=0.1), f"stage {stage}"
