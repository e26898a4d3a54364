"""Prompt templates, byte for byte as the models were trained: a conversation to the text to read and the text to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    content: str


@dataclass(frozen=True)
class Template:
    """What stands around the turns of a conversation.

    `together`: source and target are encoded as one text and no end token follows unless asked for; else they are encoded
    apart and the target always ends with one. `max_length` is where the template's own trainer cuts a sample, in tokens.
    """

    name: str
    system: str
    user: str
    after_user: str
    assistant: str
    after_assistant: str
    next_turn: str
    empty_input_line: bool
    together: bool
    max_length: int | None = None


_STEP_BY_STEP = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. "
    "Please note that you need to think through your response logically and step by step."
)
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

TEMPLATES: dict[str, Template] = {
    # AscendSpeed's GeneralInstructionHandler.
    "ascendspeed": Template(
        name="ascendspeed",
        system=f"\n{_STEP_BY_STEP}\n",
        user="### Instruction:\n",
        after_user="\n",
        assistant="### Response:\n",
        after_assistant="\n",
        next_turn="",
        empty_input_line=True,
        together=True,
    ),
    # Chinese-Alpaca's training, web demo and API.
    "alpaca": Template(
        name="alpaca",
        system=f"{_ALPACA}\n\n",
        user="### Instruction:\n",
        after_user="\n\n",
        assistant="### Response: ",
        after_assistant="",
        next_turn="\n\n",
        empty_input_line=False,
        together=False,
        max_length=512,
    ),
    # Chinese-Alpaca's command line, which found these line breaks to answer better.
    "alpaca-cli": Template(
        name="alpaca-cli",
        system=f"{_ALPACA}\n\n",
        user="### Instruction:\n\n",
        after_user="\n\n",
        assistant="### Response:\n\n",
        after_assistant="",
        next_turn="\n\n",
        empty_input_line=False,
        together=False,
        max_length=512,
    ),
    # A base model: the text as it is.
    "none": Template(
        name="none",
        system="",
        user="",
        after_user="",
        assistant="",
        after_assistant="",
        next_turn="\n",
        empty_input_line=False,
        together=False,
    ),
}


def find_template(name: str) -> Template:
    """The template of that name. ValueError for a name that is not one."""
    if name not in TEMPLATES:
        raise ValueError(f"prompt template {name!r} is not known, expected one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def user_message(template: Template, instruction: str, input: str = "") -> Message:
    """An instruction and the input it works on as one turn; a template says what an empty input leaves behind."""
    content = f"{instruction}\n{input}" if input or template.empty_input_line else instruction
    return Message("user", content)


def prompt_text(template: Template, messages: Sequence[Message]) -> str:
    """The text after which the model answers: all turns so far, the last one the user's. ValueError if it is not."""
    if not messages or messages[-1].role != "user":
        raise ValueError("a prompt must end with a turn of the user")
    text = template.system
    for number, message in enumerate(messages):
        if message.role == "user":
            text += (template.next_turn if number else "") + template.user + message.content + template.after_user
        else:
            text += template.assistant + message.content + template.after_assistant
    return text + template.assistant


def generation_prompt(template: Template, instruction: str, input: str = "") -> str:
    """The text after which the model answers one instruction."""
    return prompt_text(template, [user_message(template, instruction, input)])


def source_and_target(template: Template, messages: Sequence[Message]) -> tuple[str, str]:
    """A conversation that ends with an answer: the text before that answer, and the answer. ValueError if it ends otherwise."""
    if not messages or messages[-1].role != "assistant":
        raise ValueError("a conversation to learn from must end with an answer")
    return prompt_text(template, messages[:-1]), messages[-1].content + template.after_assistant
