"""The report: runs summed up, drawn, and compared step by step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pyalpaca.report import Run, compare, main, read_run
from pyalpaca.report.picture import labels

SETTINGS = {"devices": 8, "device": "npu", "parameters": 13_199_713_280, "tp": 4, "cp": 1, "pp": 2, "sequence_parallel": False}
SETTINGS |= {"schedule": "1f1b", "zero": 0, "global_batch_size": 256, "seq_length": 256}
RECORD = {"seconds": 5.26, "global_batch_size": 256, "seq_length": 256, "tflops": 160.41, "model_tflops": 120.31}
RECORD |= {"hfu": 0.4531, "mfu": 0.3399, "memory_bytes": 57.2e9, "learning_rate": 1e-4, "grad_norm": 2.0, "skipped": 0}
RECORD |= {"tokens_per_second_per_device": 1556.77, "nan_steps": 0}
RED, GREEN, BLUE = (214, 39, 40), (44, 160, 44), (31, 119, 180)


def write(folder: Path, losses: dict[int, float], **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"step": s, "loss": x, **fields}) + "\n" for s, x in losses.items())
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def last(out: str) -> dict:
    def not_json(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(out.splitlines()[-1], parse_constant=not_json)


def colours(picture: Path) -> set[tuple[int, ...]]:
    from matplotlib.image import imread

    pixels = imread(picture)
    assert pixels.shape[0] >= 400 and pixels.shape[1] >= 600
    return {tuple(p) for p in (pixels[..., :3].reshape(-1, 3) * 255).round().astype(int).tolist()}


def errors(tmp_path: Path, a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
    return dict(compare(*(read_run(write(tmp_path / name, losses)) for name, losses in (("a", a), ("b", b)))).errors)


def test_errors_are_relative_to_the_first_run_on_the_steps_of_both(tmp_path: Path) -> None:
    found = errors(tmp_path, {1: 4.0, 2: 2.0, 3: 1.0}, {2: 2.02, 3: 0.99, 4: 7.0})
    assert found == {2: pytest.approx(0.01), 3: pytest.approx(0.01)}


def test_a_loss_that_is_no_number_is_an_infinite_error(tmp_path: Path) -> None:
    a, b = {1: math.nan, 2: 1.0, 3: math.inf, 4: 0.0}, {1: math.nan, 2: math.nan, 3: math.inf, 4: 0.0}
    assert [errors(tmp_path, a, b)[n] for n in (1, 2, 3, 4)] == [math.inf, math.inf, math.inf, 0.0]


def test_one_run_is_drawn_and_summed_up_with_its_row_of_the_published_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "a", {n: 5.0 / n for n in range(1, 31)}, **RECORD)
    (run / "train.json").write_text(json.dumps(SETTINGS))
    # The first step warms up and does not count.
    first, *rest = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([json.dumps({**json.loads(first), "seconds": 100.0}), *rest]))
    picture, words = tmp_path / "out" / "a.png", tmp_path / "out" / "a.md"
    assert main([str(run), "--output", str(picture), "--markdown", str(words)]) == 0
    out = capsys.readouterr().out
    header, _, row, *_ = ([cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if "|" in line)
    found = dict(zip(header, row, strict=True))
    assert found == {
        **{"run": str(run), "devices": "8 npu", "parameters": "13.2B", "layout": "tp4 pp2 dp1", "batch": "256"},
        **{"sequence": "256", "samples/s/p": "6.08", "tokens/s/p": "1557.41", "s/step": "5.26", "TFLOPs": "160.41"},
        **{"HFU": "45.3%", "MFU": "34.0%", "memory": "57.20 GB"},
    }
    assert f"{run}: steps 1 to 30, loss 5.0000 -> 0.1667, lowest 0.1667 at 30, gradient norm 2, at most 2" in out
    assert last(out) == {"steps": 30, "loss_first": 5.0, "loss_last": pytest.approx(1 / 6)}
    text = words.read_text()
    assert "![the runs](a.png)" in text and "| 1557.41 " in text and text.startswith(f"# {run}\n")
    assert BLUE in colours(picture) and RED not in colours(picture)
    assert sorted(file.name for file in picture.parent.iterdir()) == ["a.md", "a.png"]


def test_each_thing_that_the_steps_have_recorded_has_its_panel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib.image import imread

    heights = []
    for fields in ({}, {"learning_rate": 1e-4}, {"learning_rate": 1e-4, "grad_norm": 1.0}, RECORD):
        main([str(write(tmp_path / "a", {1: 2.0, 2: 1.0}, **fields)), "--output", str(tmp_path / "x.png")])
        heights.append(imread(tmp_path / "x.png").shape[0])
    assert heights[0] < heights[1] == heights[2] < heights[3]
    assert "| devices" not in capsys.readouterr().out  # there is no train.json


def test_a_legend_names_runs_by_what_tells_them_apart() -> None:
    def found(*names: str) -> list[str]:
        return labels([Run(name, {}, {}) for name in names])

    assert found("runs/a") == ["a"] and found("runs/a/metrics.jsonl", "runs/b") == ["a", "b"]
    assert found("x/run", "y/run") == ["x/run", "y/run"] and found("a", "a") == ["a", "a"]
    assert found("r" * 50)[0] == ".." + "r" * 38


def test_what_went_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "a", {1: 3.0, 2: math.nan, 3: 2.0}, skipped=4, nan_steps=1, valid_loss=2.5)
    assert main([str(run), "--output", str(tmp_path / "x.png")]) == 0
    out = capsys.readouterr().out
    assert "validation loss 2.5000 at 1" in out and "4 steps skipped, 1 steps not finite, 1 losses not finite" in out


def test_two_good_runs_pass_and_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", {n: 5.0 / n for n in range(1, 31)})
    b = write(tmp_path / "b", {n: 5.0 / n * (1.015 if n == 17 else 1.0) for n in range(1, 31)})
    picture = tmp_path / "deep" / "loss.png"
    assert main([str(a), str(b / "metrics.jsonl"), "--output", str(picture)]) == 0
    out = capsys.readouterr().out
    found = last(out)
    assert (found["steps"], found["worst_step"], found["passed"]) == (30, 17, True)
    assert found["max_relative_error"] == pytest.approx(0.015)
    assert "<- largest" in next(line for line in out.splitlines() if line.startswith("| 17 "))
    assert RED in colours(picture)
    assert [f.name for f in picture.parent.iterdir()] == ["loss.png"]


def test_of_several_runs_each_is_held_against_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write(tmp_path / name, {1: 1.0, 2: 1.0 + extra}) for name, extra in (("a", 0.0), ("b", 0.01), ("c", 0.05))]
    assert main([*map(str, runs), "--output", str(tmp_path / "x.png")]) == 1
    out = capsys.readouterr().out
    found = last(out)
    assert found["passed"] is False and found["max_relative_error"] == pytest.approx(0.05)
    assert [run["passed"] for run in found["runs"]] == [True, False]
    assert out.count("NOT below 0.02") == 1 and f"{runs[2]} against {runs[0]}: 2 steps" in out
    assert {RED, GREEN} <= colours(tmp_path / "x.png")
    assert main([*map(str, runs[:2]), "--output", str(tmp_path / "x.png")]) == 0


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
    assert RED in colours(tmp_path / "x.png")  # crosses where the losses would be


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
        read_run(tmp_path)


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    (write(tmp_path / "a", {1: 1.0}) / "train.json").write_text("{")
    with pytest.raises(ValueError, match=r"train.json: is not JSON"):
        read_run(tmp_path / "a")


def test_runs_that_cannot_be_compared_leave_no_picture(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {1: 1.0}), write(tmp_path / "b", {2: 1.0, 3: 1.0})
    picture = tmp_path / "x.png"
    with pytest.raises(ValueError, match=r"the runs share no step: .*a has 1 to 1, .*b 2 to 3; compare runs of the same data"):
        main([str(a), str(b), "--output", str(picture)])
    with pytest.raises(FileNotFoundError, match=r"c: not found|metrics.jsonl: not found"):
        main([str(a), str(tmp_path / "c"), "--output", str(picture)])
    assert not picture.exists()
