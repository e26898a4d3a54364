"""What the page says follows from the numbers: every timing is there, and what is missed is said to be missed."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from pyalpaca.bench.convert.page import find_goals, page, table
from pyalpaca.bench.means import geometric_means

MACHINE = {
    "cpu": "Abacus",
    "cores": 8,
    "threads": 4,
    "memory_bytes": 2**35,
    "system": "Linux 6",
    "python": "3.11",
    "torch": "2.13",
}
MACHINE |= {"pyalpaca": "0.1", "commit": "abc1234", "date": "2027-01-01", "filesystem": "ext4"}
SEVEN = {"name": "7b", "num_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_heads": 32}
ONE = {"name": "1b", "num_layers": 16, "hidden_size": 2048, "intermediate_size": 5504, "num_heads": 16}


def memory(own: int, baseline: int) -> dict[str, int]:
    return {"own": own, "baseline": baseline, "file": 10**9, "resident": own + 10**9, "looks": 99}


def row(name: str, ours: list[float], cp: list[float], own: int, half: int) -> dict[str, Any]:
    ratio = sorted(cp)[1] / sorted(ours)[1]
    return {
        "name": f"{name}/7b/warm",
        "seconds": sorted(ours)[1],
        "cpu_seconds": 33.0,
        "vs": {"cp": ratio, "plain_cp": ratio / 2},
        "ours_over": {"cp": 1 / ratio, "plain_cp": 2 / ratio},
        "bytes_per_second": 0.5e9,
        "peak_bytes": own,
        "memory": memory(own, 150_000_000),
        "half": {"layers": 16, "seconds": 9.0, "written_bytes": 7 * 10**9, "peak_bytes": half},
        "cached": {"ours": 0.97, "cp": 0.96},
        "timings": {"ours": ours, "cp": cp, "plain_cp": [t / 2 for t in cp]},
    }


@pytest.fixture
def result() -> dict[str, Any]:
    """A run that reaches everything."""
    peft = {
        "name": "merge-hf-peft/1b/warm",
        "seconds": 2.0,
        "cpu_seconds": 3.0,
        "vs": {"peft": 4.0, "peft_process": 5.0},
        "ours_over": {"peft": 0.25},
        "peak_bytes": 300_000_000,
        "memory": memory(300_000_000, 150_000_000),
        "peft_memory": memory(3_600_000_000, 270_000_000),
        "memory_vs": {"peft": 12.0, "peft_above_baseline": 22.2, "peft_resident": 3.54},
        "cached": {"ours": 1.0, "peft": 1.0},
        "timings": {"ours": [2.0], "ours_process": [3.5], "peft": [8.0], "peft_process": [17.5]},
        "max_difference": 0.0,
        "differing_tensors": 0,
    }
    settings: dict[str, Any] = {
        "scale": SEVEN,
        "peft_scale": ONE,
        "repeats": 3,
        "cache": "warm",
        "load_before": 0.07,
        "largest_tensor_bytes": 409_223_168,
    }
    rows = [
        {**row("merge-hf", [20.5, 21.25, 30.125], [15.0, 16.0, 40.0], 900_000_000, 880_000_000), "arithmetic_seconds": 5.1},
        row("hf-megatron", [16.0, 15.0, 17.0], [16.0, 15.5, 16.5], 500_000_000, 500_000_000),
        peft,
    ]
    limits = {"sgemm_flops": 182e9, "copy_bytes": 33e9, "cp_bytes": 0.9e9, "plain_cp_bytes": 1.8e9}
    return {"bench": "convert", "machine": MACHINE, "settings": settings, "limits": limits, "rows": rows, "geomean": {}}


def test_a_run_that_reaches_everything(result: dict[str, Any]) -> None:
    assert [(found, met) for _, found, met in find_goals(result)] == [
        ("1.33 x (merge-hf)", True),
        ("0.90 GB (merge-hf)", True),
        ("1.02 x (merge-hf)", True),
        ("4.00 x", True),
        ("12.00 x less", True),
    ]


@pytest.mark.parametrize(
    ("place", "value", "goal"),
    [
        (("rows", 1, "ours_over", "cp"), 1.61, "1.61 x (hf-megatron)"),
        (("rows", 1, "peak_bytes"), 1_510_000_000, "1.51 GB (hf-megatron)"),
        (("rows", 0, "half", "peak_bytes"), 700_000_000, "1.29 x (merge-hf)"),
        (("rows", 2, "vs", "peft"), 2.99, "2.99 x"),
        (("rows", 2, "memory_vs", "peft"), 9.9, "9.90 x less"),
    ],
)
def test_what_is_missed_is_said_to_be_missed(result: dict[str, Any], place: tuple[Any, ...], value: float, goal: str) -> None:
    changed = deepcopy(result)
    inner: Any = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    assert goal in [found for _, found, met in find_goals(changed) if not met]
    assert f"| {goal} | no |" in table(changed)


def test_memory_is_only_judged_at_7b(result: dict[str, Any]) -> None:
    result["settings"]["scale"] = ONE
    assert not any("GB" in text for text, _, _ in find_goals(result))


def test_the_table_has_every_timing(result: dict[str, Any]) -> None:
    said = table(result)
    assert "| merge-hf/7b/warm | 21.2 | 0.50 | 1.33 | 2.66 | 900 MB | 150 MB | 880 MB |" in said
    assert "- merge-hf/7b/warm: ours (97%) 20.5, 21.2, 30.1; cp (96%) 15, 16, 40; plain cp 7.5, 8, 20; our proc" in said
    assert "; our processor time 33; the products of the factors alone would take 5.1 at" in said
    assert "| own memory above that of the imports | 150 MB | 3330 MB | 22.20 |" in said
    assert "| seconds, the imports included | 3.5 | 17.5 | 5.00 |" in said
    assert "all tensors equal" in said
    result["rows"][2] |= {"differing_tensors": 3, "max_difference": 0.0004883}
    assert "3 tensors differ, by at most 0.00049" in table(result)


def test_the_page_says_how_and_where(result: dict[str, Any]) -> None:
    said = page(result)
    assert "`pyalpaca bench convert --scale 7b`" in said and table(result) in said
    assert "Abacus, torch on 4 of 8 cores, 32 GiB of memory, ext4, Linux 6, torch 2.13, commit abc1234, 2027-01-01; load" in said
    assert "32 layers, width 4096, feed-forward 11008" in said and "16 layers and width 2048" in said
    assert "read once, ours and cp's alike" in said
    result["settings"]["cache"] = "cold"
    assert "dropped from the page cache, ours and cp's alike" in page(result)


def test_a_run_without_peers_or_proc(result: dict[str, Any]) -> None:
    bare = result["rows"][1]
    del bare["half"], result["limits"]["cp_bytes"], result["limits"]["plain_cp_bytes"]
    bare |= {"vs": {}, "ours_over": {}, "peak_bytes": None, "memory": None, "cached": {}, "timings": {"ours": [16.0]}}
    result["rows"], result["machine"] = [bare], {**MACHINE, "memory_bytes": None}
    said = page(result)
    assert "| hf-megatron/7b/warm | 16 | 0.50 | - | - | - | - | - |" in said
    assert "peft" not in said and "cp 0" not in said and find_goals(result) == []


def test_geometric_means() -> None:
    rows: list[dict[str, Any]] = [{"vs": {"cp": 0.5, "peft": 3.0}}, {"vs": {"cp": 2.0}}, {"vs": {}}]
    assert geometric_means(rows) == {"cp": 1.0, "peft": 3.0}
