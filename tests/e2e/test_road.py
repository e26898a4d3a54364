"""The whole road, walked as a user walks it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pyalpaca.demo.make_model import RECORDS, make
from pyalpaca.demo.road import fresh, main


def demo(*flags: str) -> tuple[int, dict[str, object]]:
    """Exit status and last line of `pyalpaca demo`."""
    done = subprocess.run([sys.executable, "-m", "pyalpaca.cli", "demo", *flags], stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_the_demo_ends_with_equal_digests_equal_text_and_a_small_error(tmp_path: Path) -> None:
    status, result = demo("--output", str(tmp_path), "--steps", "10")
    assert status == 0
    assert list(result) == [
        "steps",
        "loss_first",
        "loss_last",
        "max_relative_error",
        "tp_pp_text_equal",
        "digest_equal",
        "seconds",
    ]
    assert result["steps"] == 10
    assert result["tp_pp_text_equal"] is True and result["digest_equal"] is True
    assert float(result["loss_last"]) < float(result["loss_first"])
    assert float(result["max_relative_error"]) < 1e-3
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.long
def test_one_layer_of_the_7b_goes_the_same_road_in_6_gb(tmp_path: Path) -> None:
    status, result = demo("--output", str(tmp_path), "--real-width")
    assert status == 0
    assert result["transformers_equal"] is (True if find_spec("transformers") else None)
    assert float(result["peak_memory_gb"]) < 6


@pytest.mark.long
def test_the_same_seed_makes_the_same_model_and_8_divides_neither_vocabulary(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(tmp_path / name, seed=3, steps=2)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert {str(f) for f in files} >= {
        "llama/tiny/consolidated.00.pth",
        "llama/tiny/consolidated.01.pth",
        "llama/tiny/params.json",
        "llama/tokenizer.model",
        "chinese-llama-plus/adapter_model.bin",
        "chinese-alpaca-plus/adapter_model.safetensors",
    }
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file

    from pyalpaca.data import load_tokenizer

    sizes = [load_tokenizer(tmp_path / "a" / f"chinese-{name}-plus").vocab_size for name in ("llama", "alpaca")]
    assert sizes[1] == sizes[0] + 1
    assert all(size % 8 for size in sizes)


def test_the_shipped_records_are_unique_alpaca_records_in_both_languages() -> None:
    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    assert len(records) >= 300
    assert all(set(r) == {"instruction", "input", "output"} and r["instruction"] and r["output"] for r in records)
    assert len({(r["instruction"], r["input"]) for r in records}) == len(records)
    chinese = sum(any("\u4e00" <= c <= "\u9fff" for c in r["instruction"] + r["output"]) for r in records)
    assert 0.4 < chinese / len(records) < 0.8


def test_a_demo_without_steps_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--steps is 0, expected at least 1"):
        main(["--output", str(tmp_path / "demo"), "--steps", "0"])
    assert not (tmp_path / "demo").exists()


def test_a_folder_with_files_of_a_user_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds files that no demo wrote"):
        fresh(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
