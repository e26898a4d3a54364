"""`pyalpaca bench kernels`: a quick run says all that it is to say; a name that is not known is refused with those that are."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyalpaca.bench.kernels.records import OPERATORS
from pyalpaca.commands import bench
from pyalpaca.ops import backend, backend_report

MACHINE = {"cpu", "cores", "threads", "memory_bytes", "system", "python", "torch", "pyalpaca", "commit", "date"}
SUMMARY = {"seconds", "cold_seconds", "spread", "calls", "page_faults", "peak_bytes", "result_bytes"}
ROW = SUMMARY | {"name", "flops", "bytes", "flops_per_second", "bytes_per_second", "limit", "limit_seconds", "limit_share"}
ROW |= {"cold_limit_share", "vs", "vs_cold", "peers"}

with backend("cpp"):
    built = backend_report()[0].backend == "cpp"
needs_extension = pytest.mark.skipif(not built, reason="the extension is not built")


def last_line(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    *before, line = capsys.readouterr().out.splitlines()
    return "\n".join(before), json.loads(line)


@needs_extension
def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "plot", "markdown")}
    arguments = ["kernels", "--quick", "--op", "rms_norm,lora_merge", "--dtype", "float32,float16"]
    arguments += [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    threads = torch.get_num_threads()
    assert bench.main(arguments) == 0
    assert torch.get_num_threads() == threads
    printed, result = last_line(capsys)
    assert set(result) == {"bench", "machine", "quick", "limits", "probes", "rows", "geomean", "geomean_by", "targets"}
    assert result["bench"] == "kernels" and set(result["machine"]) == MACHINE | {"device", "capability"}
    assert set(result["limits"]) == {"sgemm_flops", "copy_bytes", "read_bytes"}
    assert all(rate in result["probes"].values() and rate > 1e8 for rate in result["limits"].values())
    names = [f"rms_norm/{d}/{t}/small/128" for t in ("float32", "float16") for d in ("fwd", "bwd")]
    assert [row["name"] for row in result["rows"]] == [*names, *(f"lora_merge/fwd/{t}/small/256" for t in ("float32", "float16"))]
    for row in result["rows"]:
        check_row(row)
        assert f"| {row['name'].split('/', 1)[1]} |" in printed
    assert {"plain", "functional"} <= set(result["rows"][0]["vs"]) and list(result["rows"][-1]["vs"]) == ["plain"]
    assert set(result["geomean_by"]) == {row["name"].rsplit("/", 2)[0] for row in result["rows"]}
    assert result["geomean_by"]["lora_merge/fwd/float32"]["plain"] == pytest.approx(result["rows"][-2]["vs"]["plain"], rel=0.01)

    assert json.loads(files["json"].read_text()) == result
    lines = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert [float(line["seconds"]) for line in lines] == [row["seconds"] for row in result["rows"]]
    assert lines[-1]["functional_vs"] == "" and float(lines[-1]["plain_vs"]) == result["rows"][-1]["vs"]["plain"]
    assert files["plot"].read_bytes().startswith(b"\x89PNG")
    assert "### rms_norm\n\nShape: tokens x width. Counted: x is read" in files["markdown"].read_text()

    # What earlier runs have written prints the same again, and two are one if they have no row in common.
    assert bench.main(["kernels", "--from", str(files["json"])]) == 0
    assert last_line(capsys) == (printed, result)
    with pytest.raises(ValueError, match="two of the runs have the row rms_norm/fwd/float32/small/128: leave one"):
        bench.main(["kernels", "--from", str(files["json"]), str(files["json"])])


def check_row(row: dict[str, Any]) -> None:
    """The numbers of a row fit together."""
    assert set(row) == ROW and set(row["vs"]) == set(row["vs_cold"]) == set(row["peers"])
    for summary in (row, *row["peers"].values()):
        assert set(summary) >= SUMMARY and summary["calls"] >= 2 and summary["seconds"] > 0 and summary["cold_seconds"] > 0
    for peer, ratio in row["vs"].items():
        assert ratio == pytest.approx(row["peers"][peer]["seconds"] / row["seconds"], rel=0.002)
    assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"], rel=0.002)
    assert row["limit_share"] == pytest.approx(row["limit_seconds"] / row["seconds"], rel=0.01, abs=0.001)


@needs_extension
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "rms_norn"], r"--op rms_norn: not known; choose from rms_norm, .*flash_attention"),
        (["--dtype", "fp32"], r"--dtype fp32: not known; choose from float32, bfloat16, float16"),
        (["--dtype", ""], r"--dtype is empty; choose from float32"),
        (["--op", "lora_merge", "--direction", "bwd"], r"--direction bwd: not known; choose from fwd$"),
        (["--shapes", ","], r"--shapes is empty; choose from llama7b/2048, "),
        (["--shapes", "llama"], r"--shapes llama: not known; choose from llama7b/2048, .*small/128"),
        (["--peers", "cuda"], r"--peers cuda: not known; choose from plain, compile, "),
        (["--threads", "0"], r"--threads 0: expected at least 1"),
        (["--seconds", "0"], r"--seconds 0: expected more than 0"),
        (["--device", "npu"], r"--device npu: torch_npu "),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.main(["kernels", *arguments])


def test_every_operator_has_a_small_shape_and_a_plain_peer() -> None:
    for name, operator in OPERATORS.items():
        assert operator.name == name
        assert any(label.startswith("small/") for label in operator.shapes), name
        assert "plain" in [peer.name for peer in operator.peers], name
        assert operator.on_request <= set(operator.shapes)


def test_an_output_that_is_a_folder_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    for flag in ("--json", "--csv", "--markdown", "--plot"):
        with pytest.raises(ValueError, match="is a folder, expected a file or nothing; choose another output file"):
            bench.main(["kernels", flag, str(tmp_path)])


def test_earlier_results_are_needed_where_they_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        bench.main(["kernels", "--from", str(tmp_path / "none.json")])


# Not where plain torch is a product that oneDNN makes with the processor's own bf16 instructions, or an fp16 one that takes a
# minute, or one of microseconds, which MKL begins sooner: docs/benchmarks/kernels.md has the figures.
LINEAR = ["--op", "linear", "--shapes", "llama7b/decode,llama7b/512", "--dtype", "float32"]
HEAD = ["--op", "linear_cross_entropy", "--shapes", "alpaca7b", "--dtype", "float32"]


@needs_extension
@pytest.mark.long
@pytest.mark.parametrize("operator", [name for name in OPERATORS if name not in ("linear", "linear_cross_entropy")])
def test_no_operator_is_slower_than_plain_torch(operator: str, capsys: pytest.CaptureFixture[str]) -> None:
    labels = [label for label in OPERATORS[operator].shapes if label.startswith(("llama7b", "small"))]
    assert slower_than_plain(["--op", operator, "--shapes", ",".join(labels)], capsys) == {}


@needs_extension
@pytest.mark.long
@pytest.mark.parametrize("arguments", [LINEAR, HEAD], ids=["linear", "linear_cross_entropy"])
def test_no_product_is_slower_than_plain_torch(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert slower_than_plain(arguments, capsys) == {}


def slower_than_plain(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    """{row: how much plain torch takes of our time} of a run, where that is below 0.9: what is less is noise."""
    assert bench.main(["kernels", *arguments, "--peers", "plain", "--seconds", "0.05"]) == 0
    _, result = last_line(capsys)
    assert result["rows"]
    return {row["name"]: row["vs"]["plain"] for row in result["rows"] if row["vs"]["plain"] < 0.9}
