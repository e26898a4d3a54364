"""The `pyalpaca` command: help at once, near misses named, one sentence for bad input."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pyalpaca
from pyalpaca import cli
from pyalpaca.checkpoint import memory_reader, write_hf
from pyalpaca.data import indexed_writer
from pyalpaca.model import LlamaConfig, flatten, init, parameters

COMMANDS = [name for _, name, _, _ in cli._COMMANDS]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(pyalpaca.__file__).parents[1])}
HEAVY = ("torch", "numpy", "transformers", "sentencepiece", "matplotlib", "safetensors")


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    everything = {"env": {**ENVIRONMENT, **environment}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], **everything)


def status(arguments: list[str]) -> int:
    """The exit status of `pyalpaca` with these arguments, in this process."""
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: cli.main(arguments))
    return int(end.value.code or 0)


def test_help_answers_within_a_third_of_a_second() -> None:
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        process = start("-m", "pyalpaca.cli", "--help")
        out, _ = process.communicate()
        seconds.append(time.perf_counter() - began)
        assert process.returncode == 0
        assert all(f"  {name} " in out for name in COMMANDS)
    assert min(seconds) < 0.3


def test_no_help_loads_anything_heavy() -> None:
    script = (
        "import sys\nfrom pyalpaca import cli\n"
        f"for name in {COMMANDS}:\n"
        "    try:\n        cli.main([name, '--help'])\n"
        "    except SystemExit as end:\n        assert end.code == 0, name\n"
        f"loaded = [m for m in {HEAVY} if m in sys.modules]\nassert not loaded, loaded\n"
    )
    process = start("-c", script)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("usage: ") == len(COMMANDS)
    for name in COMMANDS:
        assert f"usage: pyalpaca {name} " in out


def test_the_command_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["--version"]) == 0
    assert capsys.readouterr().out == f"pyalpaca {pyalpaca.__version__}\n"
    assert status([]) == 2
    assert "usage: pyalpaca COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "hint"), [("trian", "did you mean `train`?"), ("xyzzy", "`pyalpaca --help` lists the commands")]
)
def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str], name: str, hint: str) -> None:
    assert status([name]) == 2
    assert capsys.readouterr().err == f"error: there is no command `{name}`: {hint}\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("a.bin: is empty"), 2, "error: a.bin: is empty\n"),
        (FileNotFoundError("b: not found"), 2, "error: b: not found\n"),
        (
            PermissionError(13, "Permission denied", "/x/model.partial"),
            2,
            "error: /x/model: Permission denied; check that the path exists, may be read and written, and has space left\n",
        ),
        (FloatingPointError("step 3: loss nan"), 2, "error: step 3: loss nan\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_a_user_did_is_one_line(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str) -> None:
    def command() -> int:
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run(command)
    assert end.value.code == code
    assert capsys.readouterr().err == said


def test_what_we_did_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> int:
        raise AssertionError("a promise was broken")

    with pytest.raises(AssertionError):
        cli.run(command)
    monkeypatch.setenv("PYALPACA_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.run(lambda: cli.main(["digest", "nowhere"]))


def test_doctor_lists_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    from pyalpaca.ops import backend_report

    assert status(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = {line.split()[0]: line for line in lines if line}
    for row in backend_report():
        assert row.backend in said[row.operator] and row.reason in said[row.operator]
    for name in ("torch", "Python", "processor", "CUDA", "NPU", "C++"):
        assert name in said


@pytest.fixture
def road(tmp_path: Path) -> Path:
    """A model of 4 heads without a tokenizer, and prepared data with one token more than it knows."""
    config = LlamaConfig(20, 32, 48, 2, 4, 4, 8)
    fresh = flatten(init(parameters(config)))
    write_hf(memory_reader(config, {p.name: fresh[p.path] for p in parameters(config)}), tmp_path / "hf")
    for name, largest in (("good", 19), ("foreign", 20)):
        for key in ("input_ids", "labels"):
            with indexed_writer(tmp_path / f"{name}_packed_{key}_document") as writer:
                writer.add([1, 5, largest, 2])
                writer.end_document()
    return tmp_path


def training(road: Path, data: str = "good") -> list[str]:
    return ["train", "--model", str(road / "hf"), "--data", str(road / data), "--output", str(road / "run"), "--seq-length", "8"]


def refused(road: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that ends the command; nothing is written."""
    before = sorted(road.rglob("*"))
    assert status(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert sorted(road.rglob("*")) == before
    return said


def test_a_world_that_does_not_fit(road: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(road, capsys, [*training(road), "--tp", "2", "--pp", "2"])
    assert "1 process can't form tensor-parallel 2 x pipeline-parallel 2: start a multiple of 4 of them" in said


def test_data_of_a_tokenizer_that_does_not_fit(road: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(road, capsys, training(road, "foreign"))
    assert "foreign: holds the token 20, but the model in" in said and "prepare the data with the model's own tokenizer" in said


def test_a_model_without_a_tokenizer_does_not_talk(road: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(road, capsys, ["generate", "--model", str(road / "hf"), "--prompt", "x"])
    assert "hf: holds no tokenizer; give the folder of one with --tokenizer" in said


def test_cuts_that_a_model_does_not_allow(road: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(road, capsys, ["convert", str(road / "hf"), str(road / "out"), "--to", "megatron", "--tp", "3"])
    assert "4 heads can't be cut in 3 equal parts; choose a tensor-parallel size that divides 4" in said
    said = refused(road, capsys, ["convert", str(road / "hf"), str(road / "out"), "--to", "megatron", "--pp", "3"])
    assert "2 layers can't fill 3 pipeline stages; choose a pipeline-parallel size of at most 2" in said


def test_files_that_are_not_there(road: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(road, capsys, training(road, "nowhere"))
    assert "nowhere_packed_input_ids_document.idx: no such file" in said
    said = refused(road, capsys, ["report", str(road / "hf"), str(road / "hf"), "--output", str(road / "x.png")])
    assert "metrics.jsonl: not found" in said


def test_heads_that_tp_does_not_divide_end_every_process(road: Path) -> None:
    before = sorted(road.rglob("*"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    world = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = ["-m", "pyalpaca.cli", *training(road), "--tp", "3"]
    ranks = [start(*command, RANK=str(r), LOCAL_RANK=str(r), **world) for r in range(3)]
    for process in ranks:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2
        what = "model.layers.0.self_attn.q_proj.weight: 4 heads can't be cut in 3 equal parts"
        assert err == f"error: {road / 'hf'}: {what}; choose a tensor-parallel size that divides it\n"
    assert sorted(road.rglob("*")) == before


def test_the_choices_that_the_commands_offer_are_those_there_are() -> None:
    """They are written down twice, so that `--help` need not load torch."""
    from pyalpaca.checkpoint import LAYOUTS
    from pyalpaca.checkpoint.container.torch_layout import CONTAINERS
    from pyalpaca.commands import convert, writing

    assert convert.LAYOUTS == LAYOUTS
    assert writing.CONTAINERS == CONTAINERS
