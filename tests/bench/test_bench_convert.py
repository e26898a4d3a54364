"""`pyalpaca bench convert`: a tiny run says all that it is to say, and what can't be measured is refused before it begins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pyalpaca.bench import disk
from pyalpaca.bench.convert import measure, run
from pyalpaca.bench.convert.cases import CASES, Settings, needed_bytes, stages
from pyalpaca.bench.convert.model import ADAPTERS, BASE_ROWS, SCALES, TARGETS, half, llama_config, parse_scale
from pyalpaca.commands import bench

ROW = {"name", "seconds", "vs", "ours_over", "process_seconds", "cpu_seconds", "written_bytes", "bytes_per_second"}
ROW |= {"peak_bytes", "memory", "cached", "timings"}
CP_ROW = ROW | {"limit", "limit_share", "read_bytes"}
MERGED_ROW = CP_ROW | {"arithmetic_flops", "arithmetic_seconds"}
PEFT_ROW = ROW | {"max_difference", "differing_tensors", "peft_memory", "memory_vs"}
MEMORY = {"own", "baseline", "file", "resident", "looks"}
MACHINE = {"cpu", "cores", "threads", "memory_bytes", "system", "python", "torch", "pyalpaca", "commit", "date", "filesystem"}


def last_line(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """What was printed before the last line, and that line as JSON."""
    *before, line = capsys.readouterr().out.splitlines()
    return "\n".join(before), json.loads(line)


def check_row(row: dict[str, Any], repeats: int) -> None:
    assert row["peak_bytes"] == row["memory"]["own"] > row["memory"]["baseline"] > 0
    assert set(row["memory"]) == MEMORY
    assert all(len(timings) == repeats and min(timings) > 0 for timings in row["timings"].values())
    assert row["process_seconds"] > row["seconds"] > 0
    assert all(0 <= share <= 1 for share in row["cached"].values())
    for peer, ratio in row["ours_over"].items():
        assert ratio * row["vs"][peer] == pytest.approx(1, rel=0.05)


def test_a_tiny_run_beside_cp(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    work, page, copy = tmp_path / "work", tmp_path / "page.md", tmp_path / "result.json"
    arguments = ["convert", "--scale", "tiny", "--cases", "hf-safetensors", "--peers", "cp", "--repeats", "1", "--no-half"]
    arguments += ["--keep", "--work-dir", str(work), "--json", str(copy), "--markdown", str(page)]
    assert bench.main(arguments) == 0
    printed, result = last_line(capsys)
    assert set(result) == {"bench", "machine", "settings", "limits", "rows", "geomean"}
    assert result["bench"] == "convert" and set(result["machine"]) == MACHINE
    assert set(result["limits"]) == {"sgemm_flops", "copy_bytes", "cp_bytes", "plain_cp_bytes"}
    (row,) = result["rows"]
    assert row["name"] == "hf-safetensors/tiny/warm" and set(row) == CP_ROW
    check_row(row, repeats=1)
    assert set(row["timings"]) == {"ours", "ours_process", "ours_cpu", "cp", "plain_cp"}
    assert row["limit_share"] == row["vs"]["cp"]
    assert result["geomean"] == {peer: pytest.approx(row["vs"][peer], rel=0.01) for peer in ("cp", "plain_cp")}
    assert row["cached"] == {"ours": 1.0, "cp": 1.0}
    base, rows = SCALES["tiny"], BASE_ROWS
    assert 2 * base.parameters(rows) < row["written_bytes"] < 2 * base.parameters(rows) + (2 << 20)
    assert json.loads(copy.read_text()) == result
    assert printed in page.read_text() and "| hf-safetensors/tiny/warm |" in printed

    # The model stays, and nothing else; the next run needs no room for it.
    assert sorted(p.name for p in work.iterdir()) == [".pyalpaca-bench", "tiny-bin"]
    made = disk.total_size([work / "tiny-bin"])
    settings = Settings(base, base, work, ("hf-safetensors",), ("cp",), halved=False)
    assert made == pytest.approx(stages(settings)[0].source_bytes(), abs=6 << 20)
    for missing, fits in ((0, True), (1, False)):
        free = needed_bytes(settings) - made - missing
        monkeypatch.setattr(disk, "free_space", lambda _, free=free: free)
        refusal = nullcontext() if fits else pytest.raises(ValueError, match=r"the benchmark needs 79\.\d\d MB")
        with refusal, measure.workspace(settings):
            pass

    # What an earlier run has written prints the same again.
    assert bench.main(["convert", "--from", str(copy), "--markdown", str(tmp_path / "again.md")]) == 0
    assert last_line(capsys) == (printed, result)
    assert (tmp_path / "again.md").read_text() == page.read_text()


@pytest.mark.long
@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
def test_every_case_and_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["convert", "--scale", "tiny", "--repeats", "1", "--work-dir", str(tmp_path / "work")]) == 0
    _, result = last_line(capsys)
    *rows, beside_peft = result["rows"]
    assert [row["name"] for row in rows] == [f"{name}/tiny/warm" for name in CASES]
    for row in rows:
        check_row(row, repeats=1)
        assert set(row) - {"half"} == (MERGED_ROW if row["name"].startswith("merge") else CP_ROW)
        assert set(row["half"]) == {"layers", "seconds", "written_bytes", "peak_bytes"}
        assert row["half"]["layers"] == 2 and row["half"]["written_bytes"] < row["written_bytes"]
    check_row(beside_peft, repeats=1)
    assert beside_peft["name"] == "merge-hf-peft/tiny/warm" and set(beside_peft) == PEFT_ROW
    assert set(beside_peft["vs"]) == {"peft", "peft_process"} and set(beside_peft["peft_memory"]) == MEMORY
    assert set(beside_peft["memory_vs"]) == {"peft", "peft_above_baseline", "peft_resident"}
    # peft adds the same fp32 product to the same fp16 weight.
    assert beside_peft["differing_tensors"] == 0
    assert not (tmp_path / "work").exists()


@contextmanager
def refused(folder: Path, match: str) -> Iterator[None]:
    """A ValueError of one sentence, and nothing written or deleted."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=match) as error:
        yield
    assert "\n" not in str(error.value)
    assert sorted(folder.rglob("*")) == before


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("something was begun")

    monkeypatch.setattr(measure, "run_fresh", never)
    monkeypatch.setattr(disk, "touch_memory", never)
    monkeypatch.setattr(disk, "free_space", lambda _: 40 * 10**9)
    arguments = ["convert", "--peers", "cp", "--work-dir", str(tmp_path / "work")]
    with refused(tmp_path, r"work: the benchmark needs 57\.\d+ GB, 40\.00 GB are free there; choose a smaller --scale or an"):
        bench.main(arguments)
    # No Megatron shards to read.
    with refused(tmp_path, r"needs 4[3-5]\.\d+ GB"):
        bench.main([*arguments, "--cases", "merge-hf"])
    # Nothing is refused that fits: one output, no copy.
    with pytest.raises(AssertionError, match="something was begun"):
        bench.main([*arguments, "--cases", "merge-hf", "--peers", ""])


def test_a_peer_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    with refused(tmp_path, "--peers peft: peft and transformers not installed; `pip install 'pyalpaca.dev.'` or leave it out"):
        bench.main(["convert", "--peers", "peft", "--work-dir", str(tmp_path / "work")])
    with refused(tmp_path, "--peers cp: there is no cp on this machine; leave it out"):
        bench.main(["convert", "--peers", "cp", "--work-dir", str(tmp_path / "work")])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--scale", "70b"], "'70b' is no scale; give one of 7b, 1b, small, tiny, or a fraction of the 7B's layers, 0.125 to 1"),
        (["--scale", "0.05"], "'0.05' is no scale"),
        (["--scale", "nan"], "'nan' is no scale"),
        (
            ["--cases", "merge-gguf"],
            "--cases merge-gguf: not known; choose from merge-hf, merge-pth, hf-megatron, megatron-hf, hf",
        ),
        (["--cases", ","], "--cases is empty; choose from merge-hf"),
        (["--peers", "rsync"], "--peers rsync: not known; choose from cp, peft"),
        (["--repeats", "0"], "--repeats 0: expected at least 1"),
        (["--from", "pyproject.toml"], "pyproject.toml: is not the result of this benchmark; give a file that --json wrote"),
    ],
)
def test_a_flag_that_makes_no_sense(tmp_path: Path, flags: list[str], said: str) -> None:
    if flags[0] == "--from":
        flags = ["--from", str(Path(__file__).parents[2] / flags[1])]
    with refused(tmp_path, said):
        bench.main(["convert", "--work-dir", str(tmp_path / "work"), *flags])


def test_a_folder_with_files_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("finished")
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with refused(tmp_path, "is no folder or holds files that no benchmark wrote; choose another --work-dir"):
            bench.main(["convert", "--scale", "tiny", "--work-dir", str(folder)])


def test_a_run_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(target: str, arguments: dict[str, Any], *_: object) -> None:
        if target.endswith(":make"):
            Path(arguments["out"]).mkdir()
        else:
            raise ValueError("the conversion fails")

    monkeypatch.setattr(measure, "run_fresh", fail)
    with refused(tmp_path, "the conversion fails"):
        bench.main(["convert", "--scale", "tiny", "--work-dir", str(tmp_path / "work")])


def test_benchmarks_are_called_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--help"]) == 0
    assert "  convert " in capsys.readouterr().out
    assert bench.main([]) == 2
    with pytest.raises(ValueError, match="there is no benchmark `konvert`: choose from convert, kernels, train"):
        bench.main(["konvert"])


@pytest.mark.parametrize("scale", [*SCALES.values(), half(SCALES["7b"])], ids=lambda scale: str(scale.name))
def test_sizes_are_counted_before_anything_is_made(scale: Any) -> None:
    from pyalpaca.model import lora_parameters, parameters

    def count(table: Any) -> int:
        total = 0
        for p in table:
            size = 1
            for n in p.shape:
                size *= n
            total += size
        return total

    assert scale.parameters(BASE_ROWS) == count(parameters(llama_config(scale, BASE_ROWS)))
    for _, r, _, rows in ADAPTERS:
        table = parameters(llama_config(scale, rows))
        full = [p for p in table if p.path in ("embed", "head")]
        assert scale.adapter_parameters(r, rows) == count([*full, *lora_parameters(table, r, TARGETS)])


def test_the_7b_is_the_published_one() -> None:
    scale = parse_scale("7b")
    assert scale.parameters(BASE_ROWS) == 6_738_415_616
    assert parse_scale("1") == scale and parse_scale("0.25").num_layers == 8 and half(scale).num_layers == 16
    assert parse_scale(parse_scale("0.25").name) == parse_scale("0.25")


def test_room_is_asked_for_the_largest_model_or_for_all_that_stay(tmp_path: Path) -> None:
    seven, one = SCALES["7b"], SCALES["1b"]
    settings = Settings(seven, one, tmp_path, tuple(CASES), ("cp", "peft"))
    main, halved, beside_peft = stages(settings)
    assert [s.scale for s in (main, halved, beside_peft)] == [seven, half(seven), one]
    # Base, adapters and shards of 13.5 + 2.0 + 13.5 GB; an output of 13.8 GB and its copy.
    assert needed_bytes(settings) == pytest.approx(57.6e9, rel=0.02)
    kept = needed_bytes(Settings(seven, one, tmp_path, tuple(CASES), ("cp", "peft"), keep=True))
    assert kept - needed_bytes(settings) == pytest.approx(halved.source_bytes() + beside_peft.source_bytes(), rel=0.03)
