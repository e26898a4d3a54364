"""Handlers: a record to the token sequences it trains on, with labels of -100 where the model only reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pyalpaca.data.loader import IGNORED
from pyalpaca.data.prompts import Message, Template, source_and_target, user_message
from pyalpaca.data.records import Record
from pyalpaca.data.tokenizer import Tokenizer

PRETRAIN = "GeneralPretrainHandler"


@dataclass(frozen=True)
class Sample:
    """One sequence: ids, labels (not shifted: the id itself, or -100) and a mask of ones, all of one length."""

    input_ids: list[int]
    labels: list[int]
    attention_mask: list[int]
    # Whether the sequence was longer than allowed.
    cut: bool = False


@dataclass(frozen=True)
class Handler:
    """The keys a record must have, and how it becomes conversations; each gives one sequence, all together one document."""

    name: str
    keys: tuple[str, ...]
    conversations: Callable[[Record, Template], list[list[Message]]]


def encode_conversation(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Message],
    append_eod: bool = False,
    seq_length: int | None = None,
) -> Sample:
    """The sequence of a conversation; only its last answer is learnt. Cut at the right to `seq_length` ids."""
    source, target = source_and_target(template, messages)
    if template.together:
        # The original looks for the last marker in the whole text, an answer that quotes the marker included.
        text = source + target
        learnt_from = text.rindex(template.assistant) + len(template.assistant)
        ids = tokenizer.encode(text, bos=True, eos=append_eod)
        num_read = len(tokenizer.encode(text[:learnt_from], bos=True))
    else:
        read = tokenizer.encode(source, bos=True)
        ids = read + tokenizer.encode(target, eos=True)
        num_read = len(read)
    return _sample(ids, [IGNORED] * num_read + ids[num_read:], seq_length)


def encode_text(
    record: Record, key: str, where: str, tokenizer: Tokenizer, append_eod: bool = False, seq_length: int | None = None
) -> Sample | None:
    """The sequence of a text to pre-train on, every token learnt; None for an empty text. ValueError if there is no text."""
    _need(record, (key,), where, PRETRAIN)
    try:
        text = _text(record, key)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; repair the record") from error
    if not text:
        return None
    ids = tokenizer.encode(text, bos=True, eos=append_eod)
    return _sample(ids, ids, seq_length)


def _sample(ids: list[int], labels: list[int], seq_length: int | None) -> Sample:
    kept = ids[:seq_length]
    return Sample(kept, labels[:seq_length], [1] * len(kept), cut=len(kept) < len(ids))


def encode_record(
    handler: Handler,
    record: Record,
    where: str,
    tokenizer: Tokenizer,
    template: Template,
    append_eod: bool = False,
    seq_length: int | None = None,
) -> list[Sample]:
    """All sequences of a record. ValueError, beginning with `where` (file and record number), if the record is not as needed."""
    _need(record, handler.keys, where, handler.name)
    try:
        conversations = handler.conversations(record, template)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{where}: {error}; it is not as {handler.name} needs it, repair the record") from error
    return [encode_conversation(tokenizer, template, messages, append_eod, seq_length) for messages in conversations]


def _need(record: Record, keys: Sequence[str], where: str, handler: str) -> None:
    for key in keys:
        if key not in record:
            found = ", ".join(repr(key) for key in record) or "nothing"
            raise ValueError(
                f"{where}: has no {key!r} but {found}; {handler} needs {' and '.join(map(repr, keys))}: "
                "check the record, or choose another --handler-name"
            )


def _general(record: Record, template: Template) -> list[list[Message]]:
    instruction, output = _text(record, "instruction"), _text(record, "output")
    return [[user_message(template, instruction, _text(record, "input", "")), Message("assistant", output)]]


def _belle(record: Record, template: Template) -> list[list[Message]]:
    """All turns stand in `instruction` as "Human:... Assistant:..."; the last answer stands in `output`."""
    messages: list[Message] = []
    for turn in _text(record, "instruction").split("Human:"):
        if not turn.strip():
            continue
        question, found, answer = turn.partition("Assistant:")
        messages.append(Message("user", question.strip()))
        if found:
            messages.append(Message("assistant", answer.strip()))
    # The text ends with "Assistant:", whose empty answer `output` fills.
    if messages and messages[-1].role == "assistant":
        messages.pop()
    if not messages:
        raise ValueError("'instruction' holds no turn of a human")
    return [[*messages, Message("assistant", _text(record, "output").strip())]]


def _moss(record: Record, template: Template) -> list[list[Message]]:
    """`chat` holds the turns; each answer is learnt in a sequence of its own, after all turns before it."""
    messages: list[Message] = []
    conversations: list[list[Message]] = []
    for turn in record["chat"].values():
        if not turn:
            continue
        human = _text(turn, "Human").replace("<eoh>", "").replace("<|Human|>: ", "").strip()
        moss = _text(turn, "MOSS").replace("<|MOSS|>:", "").replace("<eom>", "").strip()
        messages += [Message("user", human), Message("assistant", moss)]
        conversations.append(list(messages))
    return conversations


def _sharegpt(record: Record, template: Template) -> list[list[Message]]:
    """`conversations` holds the turns in a list, from "human" and "gpt" by turns; the last answer is learnt."""
    turns = record["conversations"]
    messages = [
        Message("user" if turn["from"] in ("human", "user") else "assistant", _text(turn, "value").strip())
        for turn in turns
        if turn["from"] != "system"
    ]
    roles = [message.role for message in messages]
    if len(messages) < 2 or roles[0] != "user" or any(a == b for a, b in pairwise(roles)):
        raise ValueError("'conversations' must have a human and a gpt by turns, the human first")
    return [messages[: len(messages) // 2 * 2]]


def _text(record: Record, key: str, default: str | None = None) -> str:
    value = record.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {value!r:.60}, expected text")
    return value


HANDLERS: dict[str, Handler] = {
    handler.name: handler
    for handler in (
        Handler("GeneralInstructionHandler", ("instruction", "output"), _general),
        Handler("BelleMultiTurnInstructionHandler", ("instruction", "output"), _belle),
        Handler("MOSSInstructionHandler", ("chat",), _moss),
        Handler("ShareGPTInstructionHandler", ("conversations",), _sharegpt),
    )
}
