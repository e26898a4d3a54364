"""The report: two runs compared step by step, and their picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pyalpaca.report import compare, main, read_losses


def write(folder: Path, losses: dict[int, float]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": x, "lr": 1}) + "\n" for s, x in losses.items()))
    return folder


def last(out: str) -> dict:
    def not_json(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(out.splitlines()[-1], parse_constant=not_json)


def test_errors_are_relative_to_the_first_run_on_the_steps_of_both() -> None:
    errors = compare({1: 4.0, 2: 2.0, 3: 1.0}, {2: 2.02, 3: 0.99, 4: 7.0})
    assert errors == {2: pytest.approx(0.01), 3: pytest.approx(0.01)}


def test_a_loss_that_is_no_number_is_an_infinite_error() -> None:
    errors = compare({1: math.nan, 2: 1.0, 3: math.inf, 4: 0.0}, {1: math.nan, 2: math.nan, 3: math.inf, 4: 0.0})
    assert [errors[n] for n in (1, 2, 3, 4)] == [math.inf, math.inf, math.inf, 0.0]


def test_two_good_runs_pass_and_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", {n: 5.0 / n for n in range(1, 31)})
    b = write(tmp_path / "b", {n: 5.0 / n * (1.015 if n == 17 else 1.0) for n in range(1, 31)})
    picture = tmp_path / "deep" / "loss.png"
    assert main([str(a), str(b / "metrics.jsonl"), "--output", str(picture)]) == 0
    out = capsys.readouterr().out
    found = last(out)
    assert (found["steps"], found["worst_step"], found["passed"]) == (30, 17, True)
    assert found["max_relative_error"] == pytest.approx(0.015)
    assert "<- largest" in next(line for line in out.splitlines() if line.split()[0] == "17")
    from matplotlib.image import imread

    pixels = imread(picture)
    assert pixels.shape[0] >= 400 and pixels.shape[1] >= 600
    colours = {tuple(p) for p in (pixels[..., :3].reshape(-1, 3) * 255).astype(int).tolist()}
    assert {(214, 39, 40), (44, 160, 44)} <= colours  # the second run's red, the error's green
    assert [f.name for f in picture.parent.iterdir()] == ["loss.png"]


@pytest.mark.parametrize(("bar", "status"), [("0.02", 1), ("0.06", 0)])
def test_an_error_above_the_bar_is_exit_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bar: str, status: int
) -> None:
    a, b = write(tmp_path / "a", {1: 1.0, 2: 1.0}), write(tmp_path / "b", {1: 1.05, 2: 1.0})
    assert main([str(a), str(b), "--bar", bar, "--output", str(tmp_path / "x.png")]) == status
    out = capsys.readouterr().out
    assert last(out)["passed"] is (status == 0)
    assert ("NOT below" in out) == (status == 1)


@pytest.mark.parametrize("all_bad", [False, True])
def test_a_run_that_diverged_is_drawn_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str], all_bad: bool) -> None:
    a = write(tmp_path / "a", {1: 1.0, 2: 1.0, 3: 1.0})
    b = write(tmp_path / "b", {1: math.nan if all_bad else 1.0, 2: math.nan, 3: math.inf})
    assert main([str(a), str(b), "--output", str(tmp_path / "x.png")]) == 1
    found = last(capsys.readouterr().out)
    assert found["max_relative_error"] is None and found["worst_step"] == (1 if all_bad else 2)
    assert (tmp_path / "x.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step": 1, "loss": 2}\n{"step": 2, "lo', r"metrics.jsonl: line 2 is no record of a step"),
        ('{"step": 1}\n', "line 1 is no record of a step"),
        ("[1, 2]\n", "line 1 is no record of a step"),
        ('{"step": 1, "loss": "x"}\n', "line 1 is no record of a step"),
        ("<!DOCTYPE html>\n", "line 1 is no record of a step"),
        ("", "holds no steps yet"),
        (b"\xff\xfe\x00", "line 1 is no record of a step"),
    ],
)
def test_a_damaged_file_names_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_losses(tmp_path)


def test_runs_that_cannot_be_compared_leave_no_picture(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {1: 1.0}), write(tmp_path / "b", {2: 1.0, 3: 1.0})
    picture = tmp_path / "x.png"
    with pytest.raises(ValueError, match="the runs share no step: one has 1 to 1, the other 2 to 3"):
        main([str(a), str(b), "--output", str(picture)])
    with pytest.raises(FileNotFoundError, match=r"c: not found|metrics.jsonl: not found"):
        main([str(a), str(tmp_path / "c"), "--output", str(picture)])
    assert not picture.exists()
