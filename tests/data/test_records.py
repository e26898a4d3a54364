from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from pyalpaca.data import read_records

RECORDS = [{"instruction": "一加一？", "input": "", "output": "二"}, {"instruction": 'a, "b"', "input": "x\ny", "output": "z"}]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(RECORDS, ensure_ascii=False, indent=2)),
        ("a.json", "\ufeff" + json.dumps(RECORDS)),
        ("a.json", "\n".join(json.dumps(r) for r in RECORDS)),
        ("a.jsonl", "\n\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS) + "\n"),
        ("a.csv", 'instruction,input,output\n一加一？,,二\n"a, ""b""","x\ny",z\n'),
    ],
)
def test_every_format_gives_the_same_records(name: str, text: str, tmp_path: Path) -> None:
    records, total = read_records(write(tmp_path / name, text))
    assert list(records) == RECORDS
    assert total in (2, None)


def test_plain_text_is_one_record_a_line(tmp_path: Path) -> None:
    records, _ = read_records(write(tmp_path / "a.txt", "床前明月光\n\n  two  \n"))
    assert list(records) == [{"text": "床前明月光"}, {"text": "  two  "}]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    write(tmp_path / "b.json", json.dumps(RECORDS[1:]))
    write(tmp_path / "a.json", json.dumps(RECORDS[:1]))
    write(tmp_path / "README.md", "not data")
    records, total = read_records(tmp_path)
    assert (list(records), total) == (RECORDS, 2)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet_is_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    records, total = read_records(tmp_path / "a.parquet")
    assert (list(records), total) == (RECORDS, 2)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.parquet: reading parquet needs the package `pyarrow`"):
        read_records(write(tmp_path / "a.parquet", "PAR1"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "\n\n<!DOCTYPE html>\n<html><body>", r"a\.json: is an HTML page, expected records.*download the raw file"),
        ("a.json", "version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        ("a.json", '{\n "data": [1]\n}', "holds an object, expected a list of records"),
        ("a.json", "[]", "holds an empty list"),
        ("a.json", '[{"instruction": "x"}, 7]', "record 2 is a number"),
        ("a.json", '[{"instruction": "x"}', r"is not JSON \(.*\); the file may be cut off"),
        ("a.json", "", "is empty"),
        ("a.jsonl", '{"text": "x"}\n{"text":', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]', "line 2 is a list"),
        ("a.csv", "instruction,output\n1,2\n3\n", "ends at line 3 has another number of fields"),
    ],
)
def test_what_holds_no_records_says_why(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_records(write(tmp_path / name, text))[0])


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("你好".encode("gbk"))
    with pytest.raises(ValueError, match="byte 0 is no UTF-8"):
        list(read_records(tmp_path / "a.txt")[0])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_records(tmp_path / "absent.json")
    with pytest.raises(FileNotFoundError, match="holds no file ending with"):
        read_records(tmp_path)


def test_the_shipped_records_are_many_unique_short_and_of_both_languages(shipped: Path) -> None:
    records = list(read_records(shipped / "records.json")[0])
    assert len(records) >= 320
    assert max(Counter((r["instruction"], r["input"]) for r in records).values()) == 1
    chinese = [r for r in records if re.search("[一-鿿]", r["instruction"])]
    assert 0.55 < len(chinese) / len(records) < 0.65
    assert sum(bool(r["input"]) for r in records) >= len(records) / 3
    for r in records:
        assert list(r) == ["instruction", "input", "output"]
        assert 4 <= len(r["output"]) <= 80
