"""Recorded calls come out on the emulation as recorded, in any order of the pipes, and a wrong record is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import check_vectors
import pytest

VECTORS = Path(__file__).resolve().parents[1] / "data/ascend_c_vectors.jsonl"


@pytest.mark.parametrize("seed", [0, 1, 6, 11])
def test_every_recorded_call_comes_out_as_recorded(seed: int) -> None:
    outcome = check_vectors.check(VECTORS, seed)
    assert len(outcome) == 392
    assert {name: why for name, why in outcome.items() if why} == {}


def test_wrong_records_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {case["id"]: case for case in map(json.loads, VECTORS.read_text().splitlines())}
    altered = cases["Add_f32_count_tail"]
    altered["out"]["hex"] = "00" * 4 + altered["out"]["hex"][8:]
    accepted = cases["Sub_f32_count_tail"] | {"rejected": "for this test", "rejected_by": "runtime"}
    compiles = cases["Mul_f32_count_tail"] | {"rejected": "for this test", "rejected_by": "does not compile: for this test"}
    path = tmp_path / "calls.jsonl"
    path.write_text("\n".join(map(json.dumps, [altered, accepted, compiles, cases["Max_f32_count_tail"]])))
    assert check_vectors.main([str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [*(c["id"] for c in (altered, accepted, compiles)), "1 passed, 3 failed"]
