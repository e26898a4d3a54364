"""The example scripts: their recipes are the published ones, and SMOKE=1 runs each layout here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from pyalpaca.model import LlamaConfig
from pyalpaca.parallel import Mesh
from pyalpaca.train import TrainConfig, parse
from pyalpaca.train.deepspeed_config import deepspeed_config
from pyalpaca.train.prepare import plan

EXAMPLES = Path(__file__).parents[2] / "examples" / "alpaca"
TP4_PP2 = "finetune_chinese_llama_alpaca_7_13_33b_tp4_pp2.sh"
TP1_PP1 = "finetune_chinese_llama_alpaca_7_13_33b_tp1_pp1_deepspeed.sh"
GENERATE = "generate_alpaca_13B_tp8_pp1.sh"
SFT = "sft_chinese_alpaca_lora.sh"
PRETRAIN = "pretrain_chinese_llama_lora.sh"

installed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


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


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("sft_lora.toml", (1e-4, 0.03, 0.0, "instruction", 100)),
        ("pretrain_lora.toml", (2e-4, 0.05, 0.01, "text", 0)),
    ],
)
def test_the_recipes_with_lora_are_the_original_ones(name: str, own: tuple[Any, ...]) -> None:
    config = recipe(name)
    assert (config.lr, config.warmup_fraction, config.weight_decay, config.data_type, config.eval_every) == own
    assert (config.micro_batch_size, config.global_batch_size, config.seq_length, config.epochs) == (1, 8, 512, 1.0)
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (8, 32.0, 0.05)
    assert (config.lr_schedule, config.min_lr, config.dtype, config.recompute) == ("cosine", 0.0, "fp16", "full")
    assert (config.log_every, config.save_every, config.keep) == (10, 200, 3)
    # What learns of a 7B with the merged vocabulary of 49953, and of Alpaca's with one more.
    for vocabulary, count in ((49953, 429_203_456), (49954, 429_211_648)):
        model = LlamaConfig(vocabulary, 4096, 11008, 32, 32, 32, 128, 1e-6)
        setup = plan(model, config, Mesh(torch.device("cpu")))
        assert sum(math.prod(setup.table[path].shape) for path in setup.trainable) == count


@pytest.mark.parametrize("name", [TP4_PP2, TP1_PP1, GENERATE, SFT, PRETRAIN])
def test_a_script_without_a_model_says_what_to_set(name: str, tmp_path: Path) -> None:
    done = script(name, tmp_path, MODEL_PATH="", SMOKE="0")
    assert done.returncode != 0
    assert "MODEL_PATH" in done.stderr


def test_the_deepspeed_settings_are_the_published_ones_and_agree_with_the_recipe() -> None:
    file = EXAMPLES / "ds_config_tp1_pp1.json"
    config = replace(recipe("finetune_tp1_pp1.toml"), engine="deepspeed", deepspeed_config=str(file))
    found = deepspeed_config(config, data_parallel=8)
    assert found["gradient_accumulation_steps"] == 8
    assert found["fp16"]["enabled"] and not found["bf16"]["enabled"]
    given = json.loads(file.read_text())
    assert given["fp16"] == {
        "enabled": "auto",  # as --dtype says: SMOKE=1 runs in fp32
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 8,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }
    assert given["zero_optimization"] == {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 1e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 1e8,
        "contiguous_gradients": True,
    }


@pytest.fixture(scope="module")
def smoke_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first script makes a tiny model for all."""
    return tmp_path_factory.mktemp("smoke")


@pytest.mark.long
@pytest.mark.parametrize("name", [TP4_PP2, pytest.param(TP1_PP1, marks=installed), GENERATE, SFT, PRETRAIN])
def test_smoke_runs_every_layout_on_a_tiny_model(name: str, smoke_folder: Path) -> None:
    done = script(name, smoke_folder, SMOKE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("" if name == GENERATE else '{"steps": 3')
    if name == TP1_PP1:
        settings = json.loads((smoke_folder / "runs" / "smoke" / "run" / "train.json").read_text())
        assert settings["engine"] == "deepspeed"
