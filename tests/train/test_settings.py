"""Settings: from defaults, a TOML file and flags; what is not meant is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pyalpaca.cli import run as run_command
from pyalpaca.train import TrainConfig, parse
from pyalpaca.train.flags import parser
from pyalpaca.train.run import main

NEEDED = ["--model", "m", "--data", "d", "--output", "o"]


def toml(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "recipe.toml").write_text(text)
    return ["--config", str(tmp_path / "recipe.toml")]


def test_the_file_wins_over_defaults_and_flags_over_the_file(tmp_path: Path) -> None:
    given = toml(tmp_path, 'model = "m"\n[layout]\ntp = 2\npp = 3\n[optimizer]\nlr = 1\ndecay_norms = true\n')
    config = parse([*given, *NEEDED[2:], "--pp", "4", "--no-decay-norms"])
    assert config == TrainConfig(model="m", data="d", output="o", tp=2, pp=4, lr=1.0, decay_norms=False)
    assert isinstance(config.lr, float)


def test_the_recipes_of_the_examples_are_read() -> None:
    for name, warmup in (("tp4_pp2", 3200), ("tp1_pp1", 200)):
        file = Path(__file__).parents[2] / "examples" / "alpaca" / f"finetune_{name}.toml"
        if not file.is_file():
            pytest.skip(f"{file} is not part of this copy")
        config = parse(["--config", str(file), *NEEDED])
        assert config.warmup == warmup and config.dtype == "fp16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1", r"recipe.toml: there is no setting 'learning_rate'"),
        ("[layout]\nmicro_batchsize = 1", r"there is no setting 'micro_batchsize'; did you mean 'micro_batch_size'\?"),
        ('tp = "2"', r"tp is '2', expected a value of type int"),
        ("tp = 2.0", r"tp is 2.0, expected a value of type int"),
        ("resume = 1", r"resume is 1, expected a value of type bool"),
        ("steps = true", r"steps is True, expected a value of type int"),
        ("tp = ", r"recipe.toml: is not TOML"),
        ("tp = 0", r"tp is 0, expected at least 1"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse([*toml(tmp_path, text), *NEEDED])


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.toml: not found, expected a TOML file of settings"):
        parse(["--config", str(tmp_path / "none.toml"), *NEEDED])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--micro-batchsize", "2"], "there is no flag --micro-batchsize; did you mean --micro-batch-size?"),
        (["--zzzzzzz=1"], "there is no flag --zzzzzzz=1; --help lists them"),
        (["--tp", "two"], "argument --tp: invalid int value: 'two'"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["--eval", "2"], "there is no flag --eval; did you mean --eval-every?"),
    ],
)
def test_a_flag_that_is_wrong_is_one_sentence_that_names_the_nearest(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main([*NEEDED, *flags]))
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err
    assert said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("missing", ["model", "data", "output"])
def test_what_a_run_needs_is_asked_for(missing: str) -> None:
    at = NEEDED.index(f"--{missing}")
    with pytest.raises(ValueError, match=f"--{missing} is missing: "):
        parse(NEEDED[:at] + NEEDED[at + 2 :])


def test_a_flag_for_how_long_to_train_takes_the_place_of_the_files(tmp_path: Path) -> None:
    file = toml(tmp_path, "steps = 3000")
    assert parse([*file, *NEEDED, "--epochs", "2"]).epochs == 2.0
    assert parse([*file, *NEEDED, "--epochs", "2"]).steps == TrainConfig().steps
    assert parse([*toml(tmp_path, "epochs = 1"), *NEEDED, "--steps", "7"]) == TrainConfig("m", data="d", output="o", steps=7)
    with pytest.raises(ValueError, match="steps and epochs both say how long to train; give one of them"):
        parse([*NEEDED, "--steps", "7", "--epochs", "1"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"lr": -1.0}, "lr is -1.0, expected at least 0"),
        ({"lr": float("nan")}, "lr is nan, expected at least 0"),
        ({"beta2": 1.0}, "beta2 is 1.0, expected less than 1"),
        ({"dtype": "float32"}, "dtype is 'float32', expected one of fp32, bf16, fp16"),
        ({"min_loss_scale": 0.0}, "min_loss_scale is 0.0, expected above 0"),
        ({"loss_scale": 0.5}, "min_loss_scale is 1.0, expected above 0 and at most loss_scale 0.5"),
        ({"warmup_steps": 5, "warmup_fraction": 0.1}, "warmup_steps and warmup_fraction say the same thing"),
        ({"patience": 2}, "patience is given without eval_every"),
        ({"lora_alpha": 16.0}, "lora_alpha is given without lora_r"),
        ({"recompute_every": 2}, "recompute_every is given without recompute"),
        ({"engine": "deepspeed"}, "engine deepspeed and deepspeed_config belong together"),
        ({"deepspeed_config": "x"}, "engine deepspeed and deepspeed_config belong together"),
        ({"sequence_parallel": True}, "sequence_parallel cuts over the tensor-parallel ranks, and tp is 1; give --tp 2 or more"),
        ({"schedule": "zb-h1"}, "schedule zb-h1 is for a pipeline, and pp is 1; give --pp 2 or more"),
        ({"schedule": "interleaved", "pp": 2}, "virtual_stages is 1 with schedule interleaved; interleaved wants 2 or more"),
        ({"virtual_stages": 2, "pp": 2}, "virtual_stages is 2 with schedule 1f1b; interleaved wants 2 or more, others 1"),
        ({"layers_per_stage": "3;5", "pp": 2}, "layers_per_stage is '3;5', expected numbers of layers such as 3,5"),
        ({"layers_per_stage": "3,5"}, "layers_per_stage has 2 numbers, expected one for each of pp x virtual_stages = 1 stages"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_help_explains_every_setting() -> None:
    text = "".join(parser().format_help().split())  # lines end anywhere
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
        assert "".join(field.metadata["help"].split()) in text, field.name
    assert "example:torchrun" in text
    for kept in ("pyalpacareportruns/a", "pyalpacaconvertruns/aout--tohf", "pyalpacaextractruns/aadapter"):
        assert kept in text
