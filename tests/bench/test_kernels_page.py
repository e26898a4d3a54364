"""What is said of a run follows from its numbers: targets met and missed, means, the page, the picture, runs joined."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from pyalpaca.bench.kernels.limits import Limits
from pyalpaca.bench.kernels.measure import row
from pyalpaca.bench.kernels.operator import Work
from pyalpaca.bench.kernels.page import csv_table, page, table
from pyalpaca.bench.kernels.picture import draw
from pyalpaca.bench.kernels.result import join, read, result_of
from pyalpaca.bench.kernels.targets import TARGETS, Target, judge, means
from pyalpaca.bench.kernels.timing import Samples

MACHINE = {"cpu": "Abacus", "cores": 8, "threads": 4, "memory_bytes": 2**35, "system": "Linux 6", "python": "3.11"}
MACHINE |= {"torch": "2.13", "pyalpaca": "0.1", "commit": "abc1234", "date": "2027-01-01"}
LIMITS = Limits("sgemm", 1e11, 4e10, 5e10, {"sgemm/1024": 1e11, "copy/streamed": 4e10, "read/streamed": 5e10}, {})


def made(name: str, seconds: float, least: float, limit: str = "copy", **peers: float) -> dict[str, Any]:
    """A row whose peers take so many seconds."""
    contestants = {"ours": seconds, **peers}
    found = {who: Samples([1.5 * t], [t] * 3, [0, 5, 9], peak=int(1e9 * t), result=500_000) for who, t in contestants.items()}
    return row(name, Work(1e6, 3e6, 1e6), limit, least, found)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        made("rms_norm/fwd/float32/llama7b/2048", 0.002, 0.0018, plain=0.03, compile=0.02),
        made("rms_norm/fwd/float32/llama13b/8192", 0.010, 0.0075, plain=0.16, compile=0.064),
        made("flash_attention/fwd/float32/llama7b/512", 0.01, 0.008, "sgemm", plain=0.1, sdpa=0.02),
        made("flash_attention/fwd/bfloat16/llama7b/512", 0.0125, 0.008, "sgemm", plain=0.1, sdpa=0.05),
    ]


@pytest.fixture
def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return result_of(MACHINE, "cpu", LIMITS, rows, quick=False)


def test_a_row_has_ratios_shares_and_rates(rows: list[dict[str, Any]]) -> None:
    found = rows[0]
    assert found["vs"] == {"plain": 15.0, "compile": 10.0} and found["vs_cold"] == {"plain": 15.0, "compile": 10.0}
    assert found["limit_share"] == 0.9 and found["cold_limit_share"] == 0.6 and found["cold_seconds"] == 0.003
    assert found["bytes_per_second"] == 2e9 and found["flops_per_second"] == 5e8
    assert found["page_faults"] == 5 and found["peak_bytes"] == 2_000_000 and found["calls"] == 3
    assert found["peers"]["plain"]["peak_bytes"] == 30_000_000 and found["result_bytes"] == 500_000


def test_the_worst_row_or_the_mean_is_judged(rows: list[dict[str, Any]]) -> None:
    found = {t["target"]: t for t in judge(rows)}
    share = found["rms_norm, fwd, llama7b/2048 llama13b/8192: 80% of the limit"]
    assert (share["found"], share["worst"], share["met"]) == (0.75, "rms_norm/fwd/float32/llama13b/8192", False)
    ratio = found["rms_norm, llama7b/2048 llama13b/8192: 8 x compile in the geometric mean"]
    assert ratio["found"] == 8.0 and ratio["met"] and ratio["rows"] == 2
    halves = next(t for text, t in found.items() if "the time of fp32" in text)
    assert halves["found"] == 0.8 and not halves["met"] and "at most 1.15 x" in halves["target"]


@pytest.mark.parametrize("seconds", [0.0115, 0.0116])
def test_a_bar_is_met_up_to_its_edge(rows: list[dict[str, Any]], seconds: float) -> None:
    rows[3]["seconds"] = seconds
    (found,) = (t for t in judge(rows) if "the time of fp32" in t["target"])
    assert found["met"] == (seconds == 0.0115)


def test_memory_is_judged_where_it_was_measured(rows: list[dict[str, Any]]) -> None:
    target = Target(("rms_norm",), "memory", 10.0, peer="compile")
    (found,) = judge(rows, [target])
    assert found["found"] == 6.4 and not found["met"]
    beside = Target(("rms_norm",), "workspace", 6.0, peer="compile")
    assert judge(rows, [beside])[0]["found"] == round(63.5 / 9.5, 3) and judge(rows, [beside])[0]["met"]
    for r in rows:
        r["peak_bytes"] = None
    assert judge(rows, [target, beside]) == []


def test_every_target_is_about_rows_that_the_benchmark_has() -> None:
    from pyalpaca.bench.kernels.records import OPERATORS

    for target in TARGETS:
        for name in target.operators:
            operator = OPERATORS[name]
            assert set(target.shapes) <= set(operator.shapes) and set(target.dtypes) <= set(operator.dtypes)
            assert set(target.directions) <= set(operator.directions)
            assert not target.peer or target.peer in [peer.name for peer in operator.peers], target.text()


def test_geometric_means_by_operator_direction_and_dtype(rows: list[dict[str, Any]]) -> None:
    overall, groups = means(rows)
    assert groups["rms_norm/fwd/float32"] == {"plain": round((15 * 16) ** 0.5, 3), "compile": 8.0}
    assert groups["flash_attention/fwd/bfloat16"] == {"plain": 8.0, "sdpa": 4.0}
    assert overall["sdpa"] == round((2 * 4) ** 0.5, 3) and list(overall) == ["plain", "compile", "sdpa"]
    assert means([]) == ({}, {})


def test_the_table_and_the_page(result: dict[str, Any]) -> None:
    said = table(result)
    assert "### rms_norm\n\n| direction / dtype / shape | ms | cold ms |" in said and "| faults | x plain | x compile |" in said
    assert "| fwd/float32/llama7b/2048 | 2 | 3 | 0% | 0.5 | 2 | 90% copy | 60% | 2 | 30 | 5 | 15 (15) | 10 (10) |" in said
    assert "| rms_norm/fwd/float32 | plain 15.49, compile 8.00 |" in said
    assert "sgemm at 100 GFLOP/s, copying at 40.0 GB/s read and written, reading at 50.0 GB/s" in said
    assert (
        "| all | plain 11.77, compile 8.00, sdpa 2.83 |" in said
        and "| 0.75 | 2 | rms_norm/fwd/float32/llama13b/8192 | no |" in said
    )
    whole = page(result)
    assert "Abacus, cpu (" in whole and "torch on 4 of 8 cores, 32 GiB of memory, Linux 6, torch 2.13, commit abc1234" in whole
    assert "### flash_attention\n\nShape: batch x length x heads x kv heads x head_dim. Counted: causal" in whole
    result["quick"] = True
    assert "asked for" not in table(result)


def test_a_slow_call_leaves_gaps(rows: list[dict[str, Any]]) -> None:
    slow = row("rope/fwd/float32/small/64", Work(1, 1, 1), "copy", 0.1, {"ours": Samples(warm=[2.0], faults=[3])})
    said = table(result_of(MACHINE, "cpu", LIMITS, [slow], quick=False))
    assert "| fwd/float32/small/64 | 2000 | - | 0% | 5e-10 | 1e-09 | 5% copy | - | - | - | 3 |\n" in said + "\n"
    lines = csv_table(result_of(MACHINE, "cpu", LIMITS, [slow, rows[2]], quick=False)).splitlines()
    assert lines[1].startswith("rope,fwd,float32,small/64,2.0,,0.0,1,") and lines[1].endswith("," * 18)


def test_the_picture_is_drawn_whole_or_not_at_all(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(result, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


def test_runs_in_pieces_are_one(result: dict[str, Any], rows: list[dict[str, Any]], tmp_path: Path) -> None:
    halves = [result_of(MACHINE, "cpu", LIMITS, part, quick=False) for part in (rows[:2], rows[2:])]
    assert join(halves) == result
    (tmp_path / "a.json").write_text(json.dumps(halves[0]))
    assert read(tmp_path / "a.json") == halves[0]
    with pytest.raises(ValueError, match="two of the runs have the row rms_norm/fwd/float32/llama7b/2048"):
        join([halves[0], result])
    other = deepcopy(halves[1])
    other["machine"]["commit"] = "def5678"
    with pytest.raises(ValueError, match="the runs differ in commit: abc1234 and def5678; join runs of one machine"):
        join([halves[0], other])


@pytest.mark.parametrize("text", ["", "{}", '{"bench": "convert"}', "[1]"])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: is not the result of this benchmark; give files that --json wrote"):
        read(tmp_path / "x.json")
