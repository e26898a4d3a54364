"""The example scripts: their recipes are the published ones, and SMOKE=1 runs each layout here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyalpaca.train import TrainConfig, parse

EXAMPLES = Path(__file__).parents[2] / "examples" / "alpaca"
TP4_PP2 = "finetune_chinese_llama_alpaca_7_13_33b_tp4_pp2.sh"
TP1_PP1 = "finetune_chinese_llama_alpaca_7_13_33b_tp1_pp1_deepspeed.sh"
GENERATE = "generate_alpaca_13B_tp8_pp1.sh"


def recipe(name: str) -> TrainConfig:
    return parse(["--config", str(EXAMPLES / name), "--model", "m", "--data", "d", "--output", "o"])


def script(name: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **variables}
    return subprocess.run(["bash", str(EXAMPLES / name)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_tp4_pp2_recipe_is_the_published_one() -> None:
    config = recipe("finetune_tp4_pp2.toml")
    assert (config.tp, config.pp, config.micro_batch_size, config.global_batch_size, config.seq_length) == (4, 2, 2, 16, 2048)
    assert (config.lr, config.min_lr, config.lr_schedule, config.warmup) == (1e-4, 1e-5, "cosine", 3200)
    assert (config.weight_decay, config.clip, config.dtype, config.loss_scale) == (0.01, 1.0, "fp16", 4096.0)
    assert (config.lora_r, config.lora_alpha, config.lora_full) == (64, 128.0, "embed_tokens,lm_head")


def test_the_tp1_pp1_recipe_is_the_published_one() -> None:
    config = recipe("finetune_tp1_pp1.toml")
    assert (config.tp, config.pp, config.micro_batch_size, config.global_batch_size, config.seq_length) == (1, 1, 4, 256, 256)
    assert (config.steps, config.lr, config.min_lr, config.warmup, config.save_every) == (3000, 1e-6, 0.0, 200, 750)
    assert (config.dtype, config.loss_scale, config.loss_scale_window, config.hysteresis) == ("fp16", 256.0, 1000, 2)
    assert config.recompute == "full"


@pytest.mark.parametrize("name", [TP4_PP2, TP1_PP1, GENERATE])
def test_a_script_without_a_model_says_what_to_set(name: str, tmp_path: Path) -> None:
    done = script(name, tmp_path, MODEL_PATH="", SMOKE="0")
    assert done.returncode != 0
    assert "MODEL_PATH" in done.stderr


def test_the_deepspeed_script_says_what_it_waits_for(tmp_path: Path) -> None:
    done = script(TP1_PP1, tmp_path, MODEL_PATH="models/Chinese-Alpaca-33B", SMOKE="0")
    assert done.returncode == 2
    assert "33B" in done.stderr and "ZeRO-2" in done.stderr


@pytest.mark.long
def test_smoke_runs_every_layout_on_a_tiny_model(tmp_path: Path) -> None:
    for name, expected in ((TP4_PP2, '{"steps": 3'), (TP1_PP1, '{"steps": 3'), (GENERATE, "")):
        done = script(name, tmp_path, SMOKE="1")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith(expected)
