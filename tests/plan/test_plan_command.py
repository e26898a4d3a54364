"""`pyalpaca plan`: what it prints, draws and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyalpaca.checkpoint import memory_reader, write_hf
from pyalpaca.commands.plan import main
from pyalpaca.model import LlamaConfig, Tree, config_to_hf, flatten, parameters

RECIPE = "--model 13b --tp 4 --pp 2 --dp 1 --micro-batch 2 --global-batch 16 --seq 2048 --recompute full --device ascend910b2"
PUBLISHED = "--model 13b --tp 1 --pp 1 --dp 8 --zero 2 --micro-batch 4 --global-batch 256 --seq 256"


def found(capsys: pytest.CaptureFixture[str], arguments: str) -> dict:
    main([*arguments.split(), "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_recipe_is_planned_stage_by_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(RECIPE.split()) == 0
    out = capsys.readouterr().out
    plan = found(capsys, RECIPE)
    assert "13b: 13,199,713,280 parameters, all trained" in out and plan["parameters"] == 13_199_713_280
    for s, stage in enumerate(plan["stages"]):
        line = next(line for line in out.splitlines() if line.startswith(f"stage {s} "))
        memory = stage["memory"]
        assert [f"{memory[part] / 1e9:.2f}" for part in memory] == line.split()[4:11]
        assert memory["total"] == sum(memory[part] for part in memory if part != "total")
    assert f"bubble {plan['bubble']:.1%}" in out and f"HFU {plan['hfu']:.1%}, MFU {plan['mfu']:.1%}" in out
    for word in ("tp all_reduce", "pp send", "selective: ", "full in 1 of 2: ", "fits"):
        assert word in out


@pytest.mark.parametrize(("device", "seconds"), [("ascend910b2", 5.26), ("a100", 5.48)])
def test_the_published_rows(capsys: pytest.CaptureFixture[str], device: str, seconds: float) -> None:
    assert found(capsys, f"{PUBLISHED} --device {device}")["seconds"] == pytest.approx(seconds, rel=0.05)


def test_what_does_not_fit_is_status_1_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "13b", "--micro-batch", "2"]) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT: a device needs 2" in out and "GB for optimizer and" in out and "ascend910b2 has 62.00 GB; give" in out
    plan = found(capsys, "--model 13b --micro-batch 2")
    assert plan["fits"] is False and plan["reason"] in out
    assert main(["--model", "7b", "--lora-r", "8", "--seq", "512"]) == 0


def test_a_folder_a_config_and_the_same_sizes_are_the_same_model(
    tmp_path: Path, tiny: LlamaConfig, tiny_params: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = flatten(tiny_params)
    write_hf(memory_reader(tiny, {p.name: weights[p.path] for p in parameters(tiny)}), tmp_path / "hf")
    (tmp_path / "other.json").write_text(json.dumps(config_to_hf(tiny)))
    plans = [found(capsys, f"--model {tmp_path / name}") for name in ("hf", "other.json", "hf/config.json")]
    assert plans[0]["parameters"] == sum(w.numel() for w in weights.values())
    assert all({**plan, "model": ""} == {**plans[0], "model": ""} for plan in plans)
    larger = found(capsys, f"--model {tmp_path / 'hf'} --vocab-size 200")
    assert larger["parameters"] == plans[0]["parameters"] + 2 * (200 - 157) * 64


EXAMPLES = Path(__file__).parents[2] / "examples" / "alpaca"


def test_a_recipe_is_planned_as_its_training_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = found(capsys, f"--model 13b --config {EXAMPLES / 'finetune_tp4_pp2.toml'}")
    lora = f"{RECIPE} --recompute none --dtype fp16 --lora-r 64"
    assert recipe == found(capsys, lora)
    other = found(capsys, f"--model 13b --config {EXAMPLES / 'finetune_tp1_pp1.toml'} --dp 8 --zero 2")
    assert other == found(capsys, f"{PUBLISHED} --recompute full")
    assert found(capsys, f"--model 7b --config {EXAMPLES / 'finetune_tp4_pp2.toml'} --seq 512")["layout"]["seq"] == 512


def test_a_search_lists_the_fastest_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model 13b --devices 8 --global-batch 32 --seq 1024 --search --top 4"
    assert main(arguments.split()) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["layout", "micro"] and len(rows) == 4
    plans = found(capsys, arguments)["plans"]
    assert [f"{p['seconds']:.2f}" in row for p, row in zip(plans, rows, strict=True)] == [True] * 4
    assert main(["--model", "65b", "--search"]) == 1
    assert "no layout of 1 x ascend910b2 fits" in capsys.readouterr().out


def test_the_picture_shows_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RECIPE.split(), "--output", str(tmp_path / "deep" / "memory.png")]) == 0
    assert f"picture: {tmp_path / 'deep' / 'memory.png'}" in capsys.readouterr().out
    from matplotlib.image import imread

    pixels = imread(tmp_path / "deep" / "memory.png")
    colours = {tuple(p) for p in (pixels[..., :3].reshape(-1, 3) * 255).round().astype(int).tolist()}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44), (148, 103, 189), (214, 39, 40)} <= colours


def test_a_cpu_is_measured_and_shared(capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (found(capsys, f"--model 7b --dp {n} --device cpu --seq 128")["device"] for n in (1, 2))
    assert 0.001 < one["tflops"] < 100 and 1e8 < one["memory"] < 1e14
    assert two["memory"] == pytest.approx(one["memory"] / 2, rel=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model 14b", "14b: not found, expected 7B, 13B, 33B, 65B, a model folder or a config.json"),
        ("--model 13b --device ascend910b5", "there is no device 'ascend910b5': did you mean ascend910b"),
        ("--model 13b --efficiency 1.2", "efficiency is 1.2, expected a share"),
        ("--model 13b --memory 0", "--memory is 0.0, expected a positive number"),
        ("--model 13b --layers 20,x --pp 2", "--layers is '20,x', expected numbers"),
        ("--model 13b --devices 8", "--devices 8 is for --search"),
        ("--model 13b --tp 0", "0 devices were asked for"),
    ],
)
def test_bad_input_is_one_sentence(arguments: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(arguments.split())


@pytest.mark.parametrize("content", ["{", "[1]", '{"vocab_size": 3}'])
def test_a_config_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=r"c.json: |config.json: "):
        main(["--model", str(tmp_path / "c.json")])
