"""Two checkpoints tensor by tensor: equal in any layout, or how far apart."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from checkpoint_makers import CONFIG, PLUS_VOCAB, make_adapter, make_hf, model, tensors

from pyalpaca import cli
from pyalpaca.checkpoint import diff, diff_summary, memory_reader, merge, write_megatron, write_meta

NORM = "model.layers.1.input_layernorm.weight"
GATE = "model.layers.2.mlp.gate_proj.weight"


def run(capsys, *arguments):
    """(exit status of the command line, the lines that it prints, its last line read as JSON)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: cli.main(["diff", *map(str, arguments)]))
    lines = capsys.readouterr().out.splitlines()
    return end.value.code, lines, json.loads(lines[-1], parse_constant=pytest.fail)


def changed(**edits):
    """The model with `edits`: name with _ for . -> function of the tensor, which it may change in place."""
    made = tensors()
    for name, edit in edits.items():
        edit(made[{"norm": NORM, "gate": GATE}[name]])
    return memory_reader(CONFIG, made)


def found(a, b):
    """{name: how it differs} of the tensors that are not equal."""
    return {d.name: d for d in diff(a, b) if not d.equal}


@pytest.fixture
def hf(tmp_path):
    return make_hf(tmp_path / "hf")


def test_two_layouts_of_the_same_weights_are_equal(tmp_path, hf, capsys):
    write_meta(model(), tmp_path / "meta", num_shards=2)
    write_megatron(model(), tmp_path / "megatron", tp=2, pp=3)
    count = len(model().names)
    for other in ("meta", "megatron"):
        code, lines, last = run(capsys, hf, tmp_path / other)
        assert code == 0
        assert lines[0] == f"{count} tensors: {count} equal, 0 different, 0 in one of the two only"
        counts = {"tensors": count, "equal": count, "different": 0, "missing": 0}
        assert last == {**counts, "max_difference": 0.0, "mean_difference": 0.0}
    assert len(run(capsys, hf, tmp_path / "meta", "--all")[1]) == count + 2


def test_differences_are_measured(tmp_path, hf, capsys):
    b = changed(norm=lambda t: t[:3].copy_(t[:3] + torch.tensor([1.0, -2.0, 0.5], dtype=t.dtype)))
    expected = (b.read(NORM).float() - model().read(NORM).float()).abs()
    code, lines, last = run(capsys, hf, make_hf(tmp_path / "b", b))
    assert code == 1 and len(lines) == 3
    assert lines[0] == f"max {expected.max():.3e}  mean {expected.mean():.3e}  {NORM}: 3 of 64 values"
    elements = sum(math.prod(shape) for shape in model().shapes.values())
    assert last["max_difference"] == pytest.approx(float(expected.max()), rel=1e-12)
    assert last["mean_difference"] == pytest.approx(float(expected.double().sum()) / elements, rel=1e-12)
    assert (last["different"], last["missing"]) == (1, 0)


def test_a_large_tensor_is_compared_piece_by_piece(monkeypatch):
    monkeypatch.setattr(sys.modules["pyalpaca.checkpoint.diff"], "_CHUNK", 7)
    whole = found(model(), changed(gate=lambda t: t.mul_(1.5)))[GATE]
    gap = (tensors()[GATE].float() - (tensors()[GATE] * 1.5).float()).abs()
    assert whole.max == float(gap.max()) and whole.mean == pytest.approx(float(gap.double().mean()), rel=1e-12)


def test_merged_views_of_either_side(tmp_path, hf, capsys):
    adapter = make_adapter(tmp_path / "adapter")
    merge(hf, [adapter], tmp_path / "merged", "meta")
    assert run(capsys, hf, tmp_path / "merged", "--lora-a", adapter)[0] == 0
    assert run(capsys, tmp_path / "merged", hf, "--lora-b", adapter)[0] == 0
    code, lines, _ = run(capsys, hf, tmp_path / "merged")
    assert code == 1 and {line.split(".")[-2] for line in lines[:-2]} == {"q_proj", "v_proj", "down_proj"}


def test_a_padded_vocabulary_is_cut_where_it_is_told(tmp_path, hf, capsys):
    write_megatron(model(), tmp_path / "megatron", tp=2)
    (tmp_path / "megatron" / "config.json").unlink()
    assert run(capsys, hf, tmp_path / "megatron", "--vocab-size-b", CONFIG.vocab_size)[0] == 0


def test_another_vocabulary_another_depth(tmp_path, hf, capsys):
    config = replace(CONFIG, vocab_size=PLUS_VOCAB, num_layers=2)
    code, lines, last = run(capsys, hf, make_hf(tmp_path / "b", model(config)))
    assert code == 1 and last["missing"] == 9
    assert any(line.endswith(f"model.embed_tokens.weight: shape 97 x 64 in A, {PLUS_VOCAB} x 64 in B") for line in lines)
    assert any(line.endswith("model.layers.2.mlp.up_proj.weight: missing in B") for line in lines)
    assert any("missing in A" in line for line in run(capsys, tmp_path / "b", hf)[1])
    assert last["tensors"] == last["equal"] + last["different"] + last["missing"]


def test_another_type_is_named_even_with_the_same_values():
    wide = memory_reader(CONFIG, {name: t.float() for name, t in tensors().items()})
    entries = list(diff(model(), wide))
    assert {d.reason for d in entries} == {"dtype float16 in A, float32 in B"}
    assert diff_summary(entries)["max_difference"] == 0.0 and diff_summary(entries)["equal"] == 0


def test_float64_is_not_rounded_before_it_is_compared():
    a = {name: t.double() for name, t in tensors().items()}
    b = {**a, NORM: a[NORM] + 1e-12}
    assert found(memory_reader(CONFIG, a), memory_reader(CONFIG, b))[NORM].max == pytest.approx(1e-12, rel=1e-3)


def test_nan_and_infinity_in_the_same_places_are_equal():
    def broken(t):
        t[:2] = torch.tensor([math.nan, -math.inf], dtype=t.dtype)

    assert not found(changed(norm=broken), changed(norm=broken))


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("value", "said"), [(math.nan, "1 NaN in one only"), (math.inf, "1 infinite in one only")])
def test_nan_or_infinity_on_one_side_is_told_and_is_no_number(tmp_path, hf, capsys, value, said, swap):
    sides = [hf, make_hf(tmp_path / "b", changed(norm=lambda t: t[5].fill_(value), gate=lambda t: t.add_(1)))]
    code, lines, last = run(capsys, *(sides[::-1] if swap else sides))
    assert code == 1 and last["different"] == 2
    assert any(line.startswith(f"max {value}  mean {value}  {NORM}: 1 of 64 values, {said}") for line in lines)
    assert last["max_difference"] is None and last["mean_difference"] is None


def test_bad_input_is_status_2(tmp_path, hf, capsys):
    for arguments in ([hf, tmp_path / "nowhere"], [hf, tmp_path], [hf, hf, "--lora-a", tmp_path / "none"], [hf]):
        with pytest.raises(SystemExit) as end:
            cli.run(lambda arguments=arguments: cli.main(["diff", *map(str, arguments)]))
        assert end.value.code == 2
        assert capsys.readouterr().out == ""
