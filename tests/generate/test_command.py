"""`pyalpaca generate`: prompts from flags, a file or the terminal; answers on stdout and as JSON lines."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pyalpaca.generate.engine import Model, generate_text
from pyalpaca.generate.run import main

SHORT = ["--max-new-tokens", "6"]


def test_each_prompt_is_answered_in_order(folder: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("second\n\nthird\u2028line\n", encoding="utf-8")
    out = tmp_path / "deep" / "answers.jsonl"
    flags = ["--prompt", "first", "--prompts-file", str(tmp_path / "prompts.txt"), "--output", str(out)]
    assert main(["--model", str(folder), *SHORT, *flags]) == 0
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]
    assert [f["prompt"] for f in found] == ["first", "second", "third\u2028line"]
    for record in found:
        assert record["answer"] == "".join(generate_text(model, record["prompt"], 6))
        prompt = model.tokenizer.encode(record["prompt"], bos=True)
        assert model.tokenizer.decode(prompt + record["ids"]) == record["prompt"] + record["answer"]
    said = capsys.readouterr()
    assert said.out == "".join(f["answer"] + "\n" for f in found)
    assert said.err.count("tokens/s]") == 3


def test_prompts_come_from_the_terminal_until_quit(
    folder: Path, model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\nquit\nnever\n"))
    assert main(["--model", str(folder), *SHORT]) == 0
    assert capsys.readouterr().out == "".join(generate_text(model, "one", 6)) + "\n"


def test_a_template_stands_around_the_prompt(folder: Path, model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", str(folder), *SHORT, "--prompt", "x", "--template", "alpaca-cli"])
    said = capsys.readouterr().out
    main(["--model", str(folder), *SHORT, "--prompt", "x"])
    assert said != capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts-file", "none.txt"], "none.txt: not found, expected a text file with one prompt a line"),
        (["--prompt", "x", "--template", "llama9"], "prompt template 'llama9' is not known, expected one of"),
        (["--prompt", "x", "--tp", "2"], "1 process can't form tensor-parallel 2 .*: start a multiple of 2"),
        (["--prompt", "x", "--top-p", "2"], "top_p 2.0"),
        (["--prompt", "x " * 200], r"the prompt has \d+ tokens, the model was made for 128; shorten it"),
    ],
)
def test_what_does_not_fit_is_one_sentence(folder: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(["--model", str(folder), "--output", str(tmp_path / "out.jsonl"), *flags])
    assert not list(tmp_path.iterdir())
