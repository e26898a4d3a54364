from __future__ import annotations

from pathlib import Path

import pytest

from pyalpaca.data import HANDLERS, Message, Tokenizer, find_template, generation_prompt, prompt_text, read_records
from pyalpaca.data.instruction import Sample, encode_record

SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request. Please note that you need to think through your response logically and step by step."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
RECORD = {"instruction": "保持健康的三个提示。", "input": "", "output": "以下是保持健康的三个提示："}


def encode(
    tokenizer: Tokenizer, handler: str, record: dict[str, object], template: str = "ascendspeed", **how: object
) -> list[Sample]:
    return encode_record(HANDLERS[handler], record, "data.json: record 3", tokenizer, find_template(template), **how)  # type: ignore[arg-type]


def read_and_learnt(tokenizer: Tokenizer, sample: Sample) -> tuple[str, str]:
    """The text that is only read and the text that is learnt, with special tokens; the mask and the labels must fit them."""
    num_read = sample.labels.count(-100)
    assert sample.labels == [-100] * num_read + sample.input_ids[num_read:]
    assert sample.attention_mask == [1] * len(sample.input_ids)
    read, learnt = sample.input_ids[:num_read], sample.input_ids[num_read:]
    # Behind <s> decoding keeps the space that stands before every text.
    return tokenizer.decode(read, skip_special=False), tokenizer.decode([tokenizer.bos_id, *learnt], skip_special=False)[3:]


def test_the_ascendspeed_template_is_byte_exact(alpaca: Tokenizer) -> None:
    (sample,) = encode(alpaca, "GeneralInstructionHandler", RECORD)
    assert read_and_learnt(alpaca, sample) == (
        f"<s> \n{SYSTEM}\n### Instruction:\n保持健康的三个提示。\n\n### Response:\n",
        "以下是保持健康的三个提示：\n",
    )
    (sample,) = encode(alpaca, "GeneralInstructionHandler", {**RECORD, "input": "简短"}, append_eod=True)
    assert read_and_learnt(alpaca, sample) == (
        f"<s> \n{SYSTEM}\n### Instruction:\n保持健康的三个提示。\n简短\n### Response:\n",
        "以下是保持健康的三个提示：\n</s>",
    )


def test_the_alpaca_template_gives_the_known_ids(alpaca: Tokenizer) -> None:
    (sample,) = encode(alpaca, "GeneralInstructionHandler", RECORD, "alpaca")
    assert sample.labels.count(-100) == 42
    assert sample.input_ids[40:] == [29901, 29871, 29871, 41142, 32467, 32500, 30210, 33178, 34464, 30383, 2]
    assert alpaca.decode(sample.input_ids[:42]) == f"{ALPACA}### Instruction:\n保持健康的三个提示。\n\n### Response: "
    (with_input,) = encode(alpaca, "GeneralInstructionHandler", {**RECORD, "input": "简短"}, "alpaca")
    assert "提示。\n简短\n\n### Response: " in alpaca.decode(with_input.input_ids)


@pytest.mark.parametrize(
    ("template", "without", "with_input"),
    [
        (
            "ascendspeed",
            f"\n{SYSTEM}\n### Instruction:\nQ\n\n### Response:\n",
            f"\n{SYSTEM}\n### Instruction:\nQ\nI\n### Response:\n",
        ),
        ("alpaca", f"{ALPACA}### Instruction:\nQ\n\n### Response: ", f"{ALPACA}### Instruction:\nQ\nI\n\n### Response: "),
        (
            "alpaca-cli",
            f"{ALPACA}### Instruction:\n\nQ\n\n### Response:\n\n",
            f"{ALPACA}### Instruction:\n\nQ\nI\n\n### Response:\n\n",
        ),
        ("none", "Q", "Q\nI"),
    ],
)
def test_what_a_model_is_asked_is_byte_exact(template: str, without: str, with_input: str) -> None:
    assert generation_prompt(find_template(template), "Q") == without
    assert generation_prompt(find_template(template), "Q", "I") == with_input


@pytest.mark.parametrize("template", ["ascendspeed", "alpaca"])
def test_a_model_is_asked_as_it_was_trained(template: str, alpaca: Tokenizer) -> None:
    (sample,) = encode(alpaca, "GeneralInstructionHandler", RECORD, template)
    prompt = alpaca.encode(generation_prompt(find_template(template), RECORD["instruction"]), bos=True)
    assert sample.input_ids[: sample.labels.count(-100)] == prompt


def test_only_what_follows_the_last_marker_is_learnt(alpaca: Tokenizer) -> None:
    (sample,) = encode(alpaca, "GeneralInstructionHandler", {**RECORD, "output": "a\n### Response:\nb"})
    assert read_and_learnt(alpaca, sample)[1] == "b\n"


def test_a_sequence_is_cut_at_the_right(alpaca: Tokenizer) -> None:
    (whole,) = encode(alpaca, "GeneralInstructionHandler", RECORD, "alpaca")
    (cut,) = encode(alpaca, "GeneralInstructionHandler", RECORD, "alpaca", seq_length=45)
    assert (cut.input_ids, cut.labels, cut.cut) == (whole.input_ids[:45], whole.labels[:45], True)
    assert not whole.cut


def test_belle_s_turns_are_read_and_the_output_is_learnt(alpaca: Tokenizer) -> None:
    record = {"instruction": "Human:你好\nAssistant:您好！\nHuman:一加一？\nAssistant:\n", "input": "", "output": " 二\n"}
    (sample,) = encode(alpaca, "BelleMultiTurnInstructionHandler", record)
    first = f"<s> \n{SYSTEM}\n### Instruction:\n你好\n### Response:\n您好！\n"
    assert read_and_learnt(alpaca, sample) == (first + "### Instruction:\n一加一？\n### Response:\n", "二\n")


def test_moss_learns_every_answer_in_a_sequence_of_its_own(alpaca: Tokenizer) -> None:
    chat = {
        "turn_1": {"Human": "<|Human|>: 你好<eoh>\n", "MOSS": "<|MOSS|>: 您好！<eom>\n"},
        "turn_2": {"Human": "<|Human|>: 再见<eoh>\n", "MOSS": "<|MOSS|>: 再会。<eom>\n"},
        "turn_3": {},
    }
    one, two = encode(alpaca, "MOSSInstructionHandler", {"chat": chat})
    first = f"<s> \n{SYSTEM}\n### Instruction:\n你好\n### Response:\n"
    assert read_and_learnt(alpaca, one) == (first, "您好！\n")
    assert read_and_learnt(alpaca, two) == (first + "您好！\n### Instruction:\n再见\n### Response:\n", "再会。\n")


def test_sharegpt_s_conversation_is_read_up_to_its_last_answer(alpaca: Tokenizer) -> None:
    turns = [("human", "你好"), ("gpt", "您好！"), ("human", "再见"), ("gpt", "再会。"), ("human", "喂？")]
    record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    (sample,) = encode(alpaca, "ShareGPTInstructionHandler", record, "alpaca")
    text = f"<s> {ALPACA}### Instruction:\n你好\n\n### Response: 您好！\n\n### Instruction:\n再见\n\n### Response: "
    assert read_and_learnt(alpaca, sample) == (text, " 再会。</s>")
    record["conversations"].pop(0)
    with pytest.raises(ValueError, match="record 3: 'conversations' must have a human and a gpt by turns"):
        encode(alpaca, "ShareGPTInstructionHandler", record)


@pytest.mark.parametrize(
    ("handler", "record", "message"),
    [
        ("GeneralInstructionHandler", {"instruction": "x"}, "has no 'output' but 'instruction'; GeneralInstructionHandler needs"),
        ("GeneralInstructionHandler", {"instruction": 7, "output": "y"}, "'instruction' is 7, expected text"),
        ("BelleMultiTurnInstructionHandler", {"instruction": " ", "output": "y"}, "holds no turn of a human"),
        ("MOSSInstructionHandler", {"chat": ["x"]}, "not as MOSSInstructionHandler needs it"),
        ("MOSSInstructionHandler", {"chat": {"turn_1": {"Human": "x"}}}, "'MOSS' is None, expected text"),
        ("ShareGPTInstructionHandler", {"conversations": [{"value": "x"}]}, "not as ShareGPTInstructionHandler needs it"),
    ],
)
def test_a_record_that_does_not_fit_is_named(handler: str, record: dict[str, object], message: str, llama: Tokenizer) -> None:
    with pytest.raises(ValueError, match=message) as error:
        encode(llama, handler, record)
    assert str(error.value).startswith("data.json: record 3: ")


def test_an_input_may_be_absent(llama: Tokenizer) -> None:
    whole = encode(llama, "GeneralInstructionHandler", {"instruction": "x", "input": "", "output": "y"})
    assert encode(llama, "GeneralInstructionHandler", {"instruction": "x", "output": "y"}) == whole
    assert encode(llama, "GeneralInstructionHandler", {"instruction": "x", "input": None, "output": "y"}) == whole


def test_a_prompt_ends_with_the_user() -> None:
    template = find_template("alpaca")
    with pytest.raises(ValueError, match="must end with a turn of the user"):
        prompt_text(template, [Message("user", "x"), Message("assistant", "y")])
    with pytest.raises(ValueError, match="'chatml' is not known, expected one of ascendspeed, alpaca"):
        find_template("chatml")


def test_labels_equal_those_made_with_transformers(llama: Tokenizer, llama_folder: Path, shipped: Path) -> None:
    """The original way: encode the whole text and the text before the answer, and count."""
    from transformers import LlamaTokenizer

    theirs = LlamaTokenizer.from_pretrained(llama_folder)
    for record in list(read_records(shipped / "records.json")[0])[::7]:
        (sample,) = encode(llama, "GeneralInstructionHandler", record)
        source = f"\n{SYSTEM}\n### Instruction:\n{record['instruction']}\n{record['input']}\n### Response:\n"
        ids, num_read = theirs.encode(source + record["output"] + "\n"), len(theirs.encode(source))
        assert (sample.input_ids, sample.labels) == (ids, [-100] * num_read + ids[num_read:])
