"""DeepSpeed moves the bytes that the plan says of ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from launch import launch
from plan_workers import deepspeed_steps
from test_plan_layouts import MODEL, RUN

from pyalpaca.plan import traffic
from pyalpaca.train.fit import planned_job

# As it is with a model larger than what ZeRO-3 would keep of it: nothing stays gathered from one pass to the next.
SETTINGS = {
    "reduce_bucket_size": 100_000,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_moves_the_bytes_of_the_formula(tmp_path: Path) -> None:
    runs = []
    for stage in (2, 3):
        file = tmp_path / f"zero{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage, **SETTINGS}}))
        runs.append(replace(RUN, engine="deepspeed", deepspeed_config=str(file), dtype="bf16"))
    for found in launch(2, deepspeed_steps, runs, MODEL):
        for stage, config, moved in zip((2, 3), runs, found, strict=True):
            expected = traffic(planned_job(config, MODEL, 2, stage), 0)
            counted: Counter[str] = Counter()
            for (_, collective), count in moved.items():
                counted[collective] += count
            assert counted["all_gather"] == expected["dp", "all_gather"]
            # gloo has no reduce_scatter for it to use, so that ZeRO-2 sums instead; beside that there are some scalars.
            scattered = counted["reduce_scatter"] + counted["all_reduce"]
            assert 0 <= scattered - expected["dp", "reduce_scatter"] < 100
