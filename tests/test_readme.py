"""What the READMEs show of pyalpaca in Python works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyalpaca.checkpoint import memory_reader, open_checkpoint, write_hf
from pyalpaca.model import LlamaConfig, flatten, init, parameters


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_example_in_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaConfig(8192, 64, 96, 1, 8, 8, 8)
    tree = flatten(init(parameters(model), seed=1))
    write_hf(memory_reader(model, {p.name: tree[p.path] for p in parameters(model)}), tmp_path / "alpaca-plus-7b")
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / page).read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["logits"].shape == (1, 3, 8192)  # type: ignore[attr-defined]
    assert open_checkpoint(tmp_path / "alpaca-plus-7b-tp8").layout == "megatron"
