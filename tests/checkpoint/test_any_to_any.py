"""Every layout to every other with one digest, through the commands; and the digest itself."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_makers import ALPACA_VOCAB, CONFIG, make_hf, model, snapshot, tensors

from pyalpaca.checkpoint import LAYOUTS, digest, memory_reader, open_checkpoint
from pyalpaca.commands import convert, merge
from pyalpaca.commands import digest as digest_command

FLAGS = {
    "hf": ["--weights", "bin"],
    "meta": ["--num-shards", "2"],
    "megatron": ["--tp", "2", "--pp", "3"],
    "deepspeed": ["--tp", "4", "--merge-mlp"],
    "native": [],
    "gguf": [],
}


@pytest.mark.parametrize(("first", "second"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_there_and_back(tmp_path, capsys, first, second):
    source, back = make_hf(tmp_path / "source"), tmp_path / "back"
    one, two = (tmp_path / (f"{i}.gguf" if layout == "gguf" else str(i)) for i, layout in enumerate((first, second)))
    convert.main([str(source), str(one), "--to", first, *FLAGS[first]])
    convert.main([str(one), str(two), "--to", second, *FLAGS[second]])
    convert.main([str(two), str(back), "--to", "hf", "--weights", "safetensors"])
    assert open_checkpoint(two).layout == second
    capsys.readouterr()
    for path in (source, one, two, back):
        digest_command.main([str(path)])
    assert set(capsys.readouterr().out.split()) == {digest(model())}
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_gguf_output_is_a_file_with_its_own_ending(tmp_path):
    source = make_hf(tmp_path / "m")
    with pytest.raises(ValueError, match=r"expected a name like model\.gguf"):
        convert.main([str(source), str(tmp_path / "out"), "--to", "gguf"])
    assert not (tmp_path / "out").exists()


def test_the_digest_is_framed_as_its_docstring_says(tmp_path, capsys):
    lines = [
        f"{hashlib.sha256(t.numpy().tobytes()).hexdigest()} {name} float16 {'x'.join(map(str, t.shape))}"
        for name, t in tensors().items()
    ]
    expected = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    digest_command.main([str(make_hf(tmp_path / "m")), "--tensors"])
    assert capsys.readouterr().out.split("\n") == [*lines, expected, ""]


def test_the_digest_depends_on_every_bit_and_on_the_type():
    whole = tensors()
    changed = {**whole, "model.norm.weight": whole["model.norm.weight"].clone()}
    changed["model.norm.weight"][-1] += 1
    wide = {name: tensor.float() for name, tensor in whole.items()}
    assert len({digest(memory_reader(CONFIG, t)) for t in (whole, changed, wide)}) == 3


def test_merging_on_the_way_equals_merging_first(road, tmp_path, capsys):
    adapters = f"{road.plus},{road.alpaca}"
    merge.main([str(road.base), "--lora", adapters, "--out", str(tmp_path / "merged")])
    convert.main([str(road.base), str(tmp_path / "direct"), "--to", "megatron", "--tp", "2", "--lora", adapters])
    capsys.readouterr()
    digest_command.main([str(tmp_path / "merged")])
    digest_command.main([str(tmp_path / "direct")])
    digest_command.main([str(road.base), "--lora", adapters])
    assert len(set(capsys.readouterr().out.split())) == 1
    assert open_checkpoint(tmp_path / "direct").config.vocab_size == ALPACA_VOCAB
    assert (tmp_path / "direct" / "tokenizer.model").read_bytes() == (road.alpaca / "tokenizer.model").read_bytes()


def test_a_copy_into_a_folder_of_another_layout_is_refused(tmp_path):
    source, other = make_hf(tmp_path / "m"), make_hf(tmp_path / "other")
    before = snapshot(tmp_path)
    for layout in ("meta", "megatron", "deepspeed", "native"):
        with pytest.raises(ValueError, match=r"model\.safetensors: belongs to another model"):
            convert.main([str(source), str(other), "--to", layout])
        with pytest.raises(ValueError, match="is what is being read"):
            convert.main([str(source), str(source), "--to", layout])
    assert snapshot(tmp_path) == before


TOOLS = [
    "convert_llama_weights_to_hf.py",
    "merge_llama_with_chinese_lora.py",
    "merge_llama_with_chinese_lora_low_mem.py",
    "ckpt_convert/llama/convert_weights_from_huggingface.py",
]


def start(tool, flags, cwd):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "tools" / tool), *flags]
    return subprocess.run(command, cwd=cwd, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_explains_itself(tool, tmp_path):
    helped = start(tool, ["--help"], tmp_path)
    assert helped.returncode == 0
    assert "example:" in helped.stdout


def test_a_tool_fails_with_one_sentence(tmp_path):
    failed = start(TOOLS[2], ["--base_model", "nowhere", "--lora_model", "a"], tmp_path)
    assert failed.returncode == 2
    assert failed.stderr == "error: nowhere: not found, expected a checkpoint folder; check the path\n"
    assert not list(tmp_path.iterdir())


def test_only_what_is_asked_for_is_read():
    """A slice of a tensor cut over shards touches those shards alone."""
    from pyalpaca.checkpoint.canonical import join

    touched = []

    def part(i):
        def read(piece):
            touched.append((i, piece))
            whole = torch.arange(10 * i, 10 * i + 10)
            return whole if piece is None else whole[piece[1] : piece[2]]

        return 10, read

    assert join(0, [part(i) for i in range(4)], (0, 15, 30)).tolist() == list(range(15, 30))
    assert touched == [(1, (0, 5, 10)), (2, None)]
