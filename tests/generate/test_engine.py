"""Generation: the ids of transformers, text as it streams, stop strings, limits, and every layout of processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generate_makers import MODEL, PIECES, answers
from launch import launch

from pyalpaca.checkpoint import memory_reader, open_checkpoint, write_hf, write_megatron, write_native
from pyalpaca.generate.engine import Model, generate_ids, generate_text, load_model
from pyalpaca.generate.sampling import Sampling

PROMPT = "Name a colour of the sky."


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [[1, *torch.randint(3, PIECES, (n,), generator=generator).tolist()] for n in (1, 5, 20)]


def test_greedy_ids_equal_those_of_transformers(folder: Path, model: Model) -> None:
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.generation_config.pad_token_id = 0
    for prompt in prompts():
        with torch.inference_mode():
            expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist()
        assert list(generate_ids(model, prompt, 16)) == [i for i in expected if i != 2]


def test_every_layout_says_the_same(folder: Path, model: Model, tmp_path: Path) -> None:
    write_native(open_checkpoint(folder), tmp_path / "native")
    write_megatron(open_checkpoint(folder), tmp_path / "megatron", tp=2, pp=2)
    expected = list(generate_ids(model, prompts()[1], 8))
    for name in ("native", "megatron"):
        assert list(generate_ids(load_model(tmp_path / name), prompts()[1], 8)) == expected


def test_two_processes_say_what_one_says(folder: Path) -> None:
    alone = answers(str(folder), prompts(), PROMPT, 1)
    assert launch(2, answers, str(folder), prompts(), PROMPT, 2) == [alone, alone]


def test_the_end_token_ends_and_is_not_yielded(model: Model) -> None:
    whole = list(generate_ids(model, prompts()[0], 10))
    ends = replace(model, tokenizer=replace(model.tokenizer, eos_id=whole[4]))
    assert list(generate_ids(ends, prompts()[0], 10)) == whole[: whole.index(whole[4])]


def test_a_seed_gives_the_same_answer_again(model: Model) -> None:
    draws = [list(generate_ids(model, prompts()[0], 20, Sampling(temperature=1.5), seed=s)) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_generation_ends_at_the_positions_that_the_model_was_made_for(model: Model) -> None:
    long = [1] + [5] * (MODEL.max_positions - 4)
    assert len(list(generate_ids(model, long, 100, Sampling(temperature=1.0)))) <= 3
    endless = replace(model, tokenizer=replace(model.tokenizer, eos_id=-1))
    assert len(list(generate_ids(endless, long, 100))) == 3
    with pytest.raises(ValueError, match="the prompt has 128 tokens, the model was made for 128; shorten it"):
        next(generate_ids(model, [1] * 128, 1))
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(generate_ids(model, [], 1))
    assert list(generate_ids(model, [1], 0)) == []


@pytest.mark.parametrize("seed", range(4))
def test_the_streamed_pieces_join_to_the_decoded_text(model: Model, seed: int) -> None:
    ids: list[int] = []
    draw = Sampling(temperature=1.5)  # warm enough for bytes that are no whole characters
    pieces = list(generate_text(model, PROMPT, 40, draw, seed=seed, on_ids=ids.append))
    prompt = model.tokenizer.encode(PROMPT, bos=True)
    assert ids == list(generate_ids(model, prompt, 40, draw, seed=seed))
    assert model.tokenizer.decode(prompt) + "".join(pieces) == model.tokenizer.decode(prompt + ids)
    assert len(pieces) > 5 and "" not in pieces


def test_an_answer_ends_before_a_stop_string_wherever_tokens_are_cut(model: Model) -> None:
    draw = Sampling(temperature=1.0)
    whole = "".join(generate_text(model, PROMPT, 40, draw, seed=1))
    for start in range(1, len(whole) - 4):
        stop = whole[start : start + 4]
        pieces = list(generate_text(model, PROMPT, 40, draw, seed=1, stop=["never said", stop]))
        assert "".join(pieces) == whole[: whole.index(stop)], stop


def test_what_only_begins_like_a_stop_string_is_said(model: Model) -> None:
    whole = "".join(generate_text(model, PROMPT, 12))
    assert "".join(generate_text(model, PROMPT, 12, stop=[whole[-3:] + "!!", whole[2:5] + "\0"])) == whole


def test_half_precision_on_a_cpu_is_asked_for_by_name(folder: Path, tmp_path: Path) -> None:
    reader = open_checkpoint(folder)
    half = memory_reader(MODEL, {n: reader.read(n).half() for n in reader.names}, folder)
    write_hf(half, tmp_path / "half")
    assert load_model(tmp_path / "half").params["norm"].dtype == torch.float32
    assert load_model(tmp_path / "half", dtype=torch.bfloat16).params["norm"].dtype == torch.bfloat16
    assert list(generate_ids(load_model(tmp_path / "half", dtype=torch.bfloat16), [1, 5], 3))


def test_a_tokenizer_larger_than_the_model_is_refused(folder: Path, tmp_path: Path) -> None:
    reader = open_checkpoint(folder)
    small = {n: reader.read(n)[:-1] if reader.shape(n)[0] == PIECES else reader.read(n) for n in reader.names}
    write_native(memory_reader(replace(MODEL, vocab_size=PIECES - 1), small), tmp_path / "small")
    with pytest.raises(ValueError, match=r"small: holds no tokenizer; give the folder of one with --tokenizer"):
        load_model(tmp_path / "small")
    with pytest.raises(ValueError, match=rf"{PIECES} tokens, but the model in .*small has {PIECES - 1}; use the tokenizer that"):
        load_model(tmp_path / "small", tokenizer=folder)
