from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pyalpaca
from pyalpaca.commands.preprocess_data import main
from pyalpaca.data import Tokenizer, batch, open_indexed, open_instruction_data, open_text_data

KEYS = ("input_ids", "attention_mask", "labels")


def run(source: Path, prefix: Path, tokenizer: Path, *flags: str) -> int:
    return main(["--input", str(source), "--output-prefix", str(prefix), "--tokenizer-name-or-path", str(tokenizer), *flags])


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Another Python, which finds the package as this one does."""
    environment = {**os.environ, "PYTHONPATH": str(Path(pyalpaca.__file__).parents[1])}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


INSTRUCTION = ("--handler-name", "GeneralInstructionHandler")


def test_the_published_command_makes_the_six_files(
    shipped: Path, alpaca_folder: Path, alpaca: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--tokenizer-type", "PretrainedFromHF", "--tokenizer-not-use-fast", "--dataset-impl", "mmap", "--log-interval", "50")
    assert run(shipped / "records.json", tmp_path / "deep" / "alpaca", alpaca_folder, *flags, *INSTRUCTION, "--append-eod") == 0
    names = {f"alpaca_packed_{key}_document.{end}" for key in KEYS for end in ("bin", "idx")}
    assert {file.name for file in (tmp_path / "deep").iterdir()} == names
    records = json.loads((shipped / "records.json").read_text(encoding="utf-8"))
    columns = [open_indexed(tmp_path / "deep" / f"alpaca_packed_{key}_document") for key in KEYS]
    for record, ids, mask, labels in zip(records, *columns, strict=True):
        assert alpaca.decode(ids).endswith(f"### Response:\n{record['output']}\n")
        assert ids[-1] == labels[-1] == alpaca.eos_id
        assert mask.tolist() == [1] * len(ids) and len(labels) == len(ids)
    assert all(column.dtype == "int32" and len(column.documents) == len(records) + 1 for column in columns)
    out = capsys.readouterr()
    assert f"{len(records)} records, {len(records)} sequences" in out.out
    assert "vocabulary 49,954, padded 50,048" in out.out and "no end token" not in out.out
    tokens, labels = batch(open_instruction_data(tmp_path / "deep" / "alpaca"), 0, 4, seed=1, seq_length=128)
    assert tokens.shape == (4, 128) and (labels >= 0).any(dim=1).all()


def test_more_workers_give_the_same_bytes(shipped: Path, llama_folder: Path, tmp_path: Path) -> None:
    for workers in ("1", "2"):
        run(shipped / "records.json", tmp_path / workers, llama_folder, *INSTRUCTION, "--workers", workers)
    for key in KEYS:
        for end in ("bin", "idx"):
            one, two = (tmp_path / f"{workers}_packed_{key}_document.{end}" for workers in (1, 2))
            assert one.read_bytes() == two.read_bytes()


def test_a_bad_record_ends_it_and_leaves_nothing(llama_folder: Path, tmp_path: Path) -> None:
    records = [{"instruction": "x", "output": "y"}] * 70 + [{"instruction": "x"}]
    source = tmp_path / "a.json"
    source.write_text(json.dumps(records))
    for workers in ("1", "2"):
        with pytest.raises(ValueError, match=r"a\.json: record 71: has no 'output'"):
            run(source, tmp_path / "out" / "p", llama_folder, *INSTRUCTION, "--workers", workers)
        assert not (tmp_path / "out").exists()


def test_answers_without_an_end_token_are_pointed_out(
    shipped: Path, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(shipped / "records.json", tmp_path / "p", llama_folder, *INSTRUCTION, "--seq-length", "100")
    out = capsys.readouterr().out
    assert "sequences have no end token" in out and "--append-eod" in out
    assert max(open_indexed(tmp_path / "p_packed_labels_document").lengths) <= 100
    run(shipped / "records.json", tmp_path / "q", llama_folder, *INSTRUCTION, "--prompt-template", "alpaca")
    assert "no end token" not in capsys.readouterr().out


def test_the_alpaca_template_cuts_at_512(llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "x", "output": "word " * 900}]))
    run(tmp_path / "a.json", tmp_path / "p", llama_folder, *INSTRUCTION, "--prompt-template", "alpaca")
    assert open_indexed(tmp_path / "p_packed_input_ids_document").lengths.tolist() == [512]
    assert "1 cut" in capsys.readouterr().out


def test_text_to_pre_train_on_is_a_sequence_a_line(llama: Tokenizer, llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("床前明月光\n\nHello world\n", encoding="utf-8")
    run(tmp_path / "a.txt", tmp_path / "p", llama_folder)
    data = open_indexed(tmp_path / "p_text_document")
    expected = [llama.encode("床前明月光", bos=True), llama.encode("Hello world", bos=True)]
    assert [data[i].tolist() for i in range(len(data))] == expected
    assert open_text_data(tmp_path / "p", 4).sample(0)[0].tolist() == expected[0][:5]

    (tmp_path / "b.jsonl").write_text('{"title": "a", "body": ""}\n{"title": "b", "body": "c"}\n')
    run(tmp_path / "b.jsonl", tmp_path / "q", llama_folder, "--json-keys", "title", "body", "--append-eod")
    assert [len(open_indexed(tmp_path / f"q_{key}_document")) for key in ("title", "body")] == [2, 1]
    assert open_indexed(tmp_path / "q_title_document")[1].tolist() == llama.encode("b", bos=True, eos=True)


def test_moss_s_turns_are_sequences_of_one_document(llama_folder: Path, tmp_path: Path) -> None:
    turn = {"Human": "a", "MOSS": "b"}
    (tmp_path / "a.json").write_text(json.dumps([{"chat": {"1": turn, "2": turn}}, {"chat": {"1": turn}}]))
    run(tmp_path / "a.json", tmp_path / "p", llama_folder, "--handler-name", "MOSSInstructionHandler")
    assert open_indexed(tmp_path / "p_packed_labels_document").documents.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--workers", "0"), "--workers is 0"),
        (("--seq-length", "1"), "--seq-length is 1, expected at least 2"),
        (("--make-vocab-size-divisible-by", "0"), "expected at least 1"),
        (("--json-keys", "body"), "record 1: has no 'body' but 'text'; GeneralPretrainHandler needs 'body'"),
    ],
)
def test_a_flag_that_makes_no_sense_says_so(flags: tuple[str, ...], message: str, llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a.txt", tmp_path / "out" / "p", llama_folder, *flags)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_records_without_text_are_not_a_data_set(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="none of its 1 records gave a sequence"):
        run(tmp_path / "a.jsonl", tmp_path / "p", llama_folder)


def test_an_html_page_is_one_sentence_and_exit_status_2(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alpaca_data.json").write_text("\n\n<!DOCTYPE html>\n<html lang='en'>")
    tool = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    command = [str(tool), "--input", str(tmp_path / "alpaca_data.json"), "--output-prefix", str(tmp_path / "p")]
    done = python(*command, "--tokenizer-name-or-path", str(llama_folder), *INSTRUCTION)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'alpaca_data.json'}: is an HTML page") and done.stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["alpaca_data.json"]


def test_help_answers_at_once_and_explains_every_flag() -> None:
    start = time.perf_counter()
    code = "import sys; from pyalpaca.commands.preprocess_data import main; main(['--help'])"
    done = python("-c", code)
    assert time.perf_counter() - start < 3
    assert done.returncode == 0 and done.stdout.count("accepted for compatibility") == 3
    code = "import sys, pyalpaca.commands.preprocess_data, pyalpaca.data; print('torch' in sys.modules)"
    assert python("-c", code).stdout == "False\n"
