"""A tokenizer's files as GGUF metadata: every id's text, score and type, so that llama.cpp needs no other file.

SentencePiece models become what llama.cpp calls `llama`, byte-level BPE (LLaMA 3) becomes `gpt2`. What is known of a
SentencePiece file beyond that, some hundred bytes, goes into keys of our own: so tokenizer.model comes back to the byte.
Source: convert_hf_to_gguf.py and gguf.vocab of llama.cpp; where tokenizer.json gives no scores, they are the merges' ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyalpaca.checkpoint.container.gguf_file import Value, open_gguf_files
from pyalpaca.checkpoint.container.sentencepiece_file import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Token,
    has_leading_space,
    read_sentencepiece,
    sentencepiece_bytes,
)
from pyalpaca.checkpoint.container.tensor_file import read_json

OWN_PIECES, OWN_FIELDS = "pyalpaca.sentencepiece.pieces", "pyalpaca.sentencepiece.fields"
"""How many of the tokens are pieces of the SentencePiece file, and that file without its pieces."""

ROLES = ("bos", "eos", "unk", "pad")
ROLE_KEYS = {
    role: f"tokenizer.ggml.{name}_token_id" for role, name in zip(ROLES, ("bos", "eos", "unknown", "padding"), strict=True)
}

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},
            {**_BYTE_LEVEL, "use_regex": False},
        ],
    },
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, {**_BYTE_LEVEL, "use_regex": True}],
    },
    "gpt-2": {**_BYTE_LEVEL, "use_regex": True},
}
"""How text is cut before byte-level BPE: llama.cpp's name for it, and what a tokenizer.json says."""


def tokenizer_metadata(source: Path | None, vocab_size: int, fields: Mapping[str, Any]) -> dict[str, Value]:
    """The `tokenizer.` keys of a model.

    source: the folder with the tokenizer's files, or a GGUF file, whose keys are taken over; None: the model has none.
    vocab_size: of the model; it has just as many tokens, unused ones to fill up.
    fields: of config.json, for the ids that the files don't name.
    ValueError if the tokenizer can't be expressed.
    """
    if source is None:
        return {"tokenizer.ggml.model": "none"}
    if source.is_file():
        return _taken_over(source, vocab_size)
    try:
        return _from_folder(source, vocab_size, fields)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{source}: its tokenizer files are not as Hugging Face writes them ({error!r}); download them again"
        ) from None


def _taken_over(path: Path, vocab_size: int) -> dict[str, Value]:
    metadata = open_gguf_files(path).metadata
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    if isinstance(tokens, list) and tokens and len(tokens) != vocab_size:
        raise ValueError(f"{path}: its tokenizer has {len(tokens)} tokens, but the model {vocab_size}; they must be equal")
    return {key: value for key, value in metadata.items() if key.startswith(("tokenizer.", "pyalpaca.sentencepiece."))}


def _from_folder(source: Path, vocab_size: int, fields: Mapping[str, Any]) -> dict[str, Value]:
    model, spelled = source / "tokenizer.model", source / "tokenizer.json"
    content = read_json(spelled) if spelled.is_file() else {}
    config = _config(source)
    kind = content["model"].get("type", "BPE") if "model" in content else "BPE"
    if model.is_file():
        pieces, rest = read_sentencepiece(model)
        values: dict[str, Value] = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        leading_space = has_leading_space(rest)
    elif kind != "BPE":
        raise ValueError(f"{spelled}: is a {kind} model, expected BPE as LLaMA's; use the model's own tokenizer")
    elif content["model"].get("byte_fallback"):
        pieces, rest = _scored(content), b""
        values = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        leading_space = _puts_space(content)
    else:
        pieces, rest, leading_space = _vocabulary(content), b"", True
        values = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _pre_tokenizer(spelled, content)}
        # A space within a merge would end its left half.
        values["tokenizer.ggml.merges"] = [" ".join(half.replace(" ", "Ġ") for half in pair) for pair in _merges(content)]
    tokens = _table(source, pieces, _added_tokens(source, content, config, pieces), vocab_size)
    values["tokenizer.ggml.tokens"] = [token.text for token in tokens]
    if values["tokenizer.ggml.model"] == "llama":
        values["tokenizer.ggml.scores"] = np.array([token.score for token in tokens], np.float32)
    values["tokenizer.ggml.token_type"] = np.array([token.kind for token in tokens], np.int32)
    values |= _roles(config, fields, tokens)
    values |= {f"tokenizer.ggml.{key}": on for key, on in _additions(content, config).items()}
    if not config.get("add_prefix_space", leading_space):
        values["tokenizer.ggml.add_space_prefix"] = False
    if template := _chat_template(source, config):
        values["tokenizer.chat_template"] = template
    if rest and sentencepiece_bytes(tokens[: len(pieces)], rest) == model.read_bytes():
        values[OWN_PIECES] = np.uint32(len(pieces))
        values[OWN_FIELDS] = np.frombuffer(rest, np.uint8)
    return values


def _merges(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json, which are texts with a space or, since 2024, pairs."""
    return [(left, right) for left, right in (m.split(" ", 1) if isinstance(m, str) else m for m in content["model"]["merges"])]


def _vocabulary(content: Mapping[str, Any]) -> list[Token]:
    """The tokens of a tokenizer.json in the order of their ids; a missing id is unused."""
    names = {i: text for text, i in content["model"]["vocab"].items()}
    size = min(max(names) + 1, 2 * len(names) + len(content.get("added_tokens") or ()))  # ids may have gaps, but not any
    return [Token(names[i]) if i in names else _fill(i) for i in range(size)]


def _fill(i: int) -> Token:
    """llama.cpp's token for an id that the tokenizer does not know."""
    return Token(f"[PAD{i}]", -10000.0, UNUSED)


def _scored(content: Mapping[str, Any]) -> list[Token]:
    """The pieces of a SentencePiece model that only its tokenizer.json is left of; a merge's rank is its piece's score."""
    special = {token["content"] for token in content.get("added_tokens") or () if token.get("special")}
    ranks: dict[str, int] = {}
    for left, right in _merges(content):
        ranks.setdefault(left + right, len(ranks))
    pieces = []
    for text, score, kind in _vocabulary(content):
        if text == content["model"].get("unk_token"):
            kind = UNKNOWN
        elif text in special:
            kind = CONTROL
        elif len(text) == 6 and text.startswith("<0x"):
            kind = BYTE
        pieces.append(Token(text, -float(ranks.get(text, len(ranks))) if kind == NORMAL else score, kind))
    return pieces


def _puts_space(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json of SentencePiece's kind puts a space before the text."""
    steps: list[Any] = []
    for part in (content.get("normalizer") or {}, content.get("pre_tokenizer") or {}):
        steps += part.get("normalizers") or part.get("pretokenizers") or [part]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _pre_tokenizer(path: Path, content: Mapping[str, Any]) -> str:
    for name, form in PRE_TOKENIZERS.items():
        if _same_cut(content.get("pre_tokenizer"), form) and not content.get("normalizer"):
            return name
    raise ValueError(
        f"{path}: cuts text in a way that llama.cpp has no name for, expected that of {', '.join(PRE_TOKENIZERS)} or a "
        "SentencePiece tokenizer; convert a folder without the tokenizer, and give llama.cpp one of its own"
    )


def _same_cut(found: Any, form: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer is this one. What it does not say is false, but `use_regex`; `trim_offsets` cuts nothing."""
    if not isinstance(found, dict) or found.get("type") != form["type"]:
        return False
    if "pretokenizers" in form:
        steps, wanted = found["pretokenizers"], form["pretokenizers"]
        return len(steps) == len(wanted) and all(_same_cut(a, b) for a, b in zip(steps, wanted, strict=True))
    return all(found.get(key, key == "use_regex") == value for key, value in form.items() if key != "trim_offsets")


def _config(folder: Path) -> dict[str, Any]:
    """special_tokens_map.json and tokenizer_config.json as one, special tokens as texts."""
    fields: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            fields |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    tokens = {f"{role}_token": fields.get(f"{role}_token") for role in ROLES}
    texts = {key: token["content"] if isinstance(token, dict) else token for key, token in tokens.items() if token}
    return {**fields, **{key: str(text) for key, text in texts.items()}}


def _added_tokens(
    folder: Path, content: Mapping[str, Any], config: Mapping[str, Any], pieces: list[Token]
) -> dict[int, tuple[str, bool]]:
    """{id: (text, whether it is special)} of the tokens that are named beside the model.

    One that only a config names, such as old Alpaca's `[PAD]`, gets the next id, as in transformers.
    """
    listed = {token["id"]: token for token in content.get("added_tokens") or ()}
    listed |= {int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items() if i.isdecimal()}
    added = {i: (token["content"], bool(token.get("special"))) for i, token in listed.items()}
    if (folder / "added_tokens.json").is_file():
        added = {i: (text, False) for text, i in read_json(folder / "added_tokens.json").items()} | added
    known = {piece.text for piece in pieces} | {text for text, _ in added.values()}
    named = [config[f"{role}_token"] for role in ROLES if f"{role}_token" in config]
    for text in named:
        if text not in known:
            known.add(text)
            added[max(len(pieces), max(added, default=-1) + 1)] = text, True
    return {i: (text, special or text in named) for i, (text, special) in added.items()}


def _table(source: Path, pieces: list[Token], added: Mapping[int, tuple[str, bool]], vocab_size: int) -> list[Token]:
    """A token for each row of the model; ids beyond are left out. ValueError if two have the same text."""
    table = (pieces + [_fill(i) for i in range(len(pieces), vocab_size)])[:vocab_size]
    for i, (text, special) in added.items():
        if not 0 <= i < vocab_size or (table[i].text == text and table[i].kind in (UNKNOWN, CONTROL, USER_DEFINED)):
            continue
        kind = CONTROL if special or (text.startswith("<|") and text.endswith("|>")) else USER_DEFINED
        table[i] = Token(text if special else text.replace("▁", " "), -1000.0, kind)
    seen: dict[str, int] = {}
    for i, token in enumerate(table):
        if seen.setdefault(token.text, i) != i:
            raise ValueError(
                f"{source}: the tokens {seen[token.text]} and {i} are both {token.text!r}, which llama.cpp can't load; "
                "use the tokenizer that belongs to the model"
            )
    return table


def _roles(config: Mapping[str, Any], fields: Mapping[str, Any], tokens: list[Token]) -> dict[str, Value]:
    """The ids of the special tokens: by the tokenizer's files, else by config.json, else as in LLaMA."""
    ids = {token.text: i for i, token in enumerate(tokens)}
    usual = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": ""}
    values: dict[str, Value] = {}
    for role in ROLES:
        stated = fields.get(f"{role}_token_id")
        by_config = stated if isinstance(stated, int) and 0 <= stated < len(tokens) else ids.get(usual[role])
        i = ids.get(config.get(f"{role}_token", ""), by_config)
        if i is not None:
            values[ROLE_KEYS[role]] = np.uint32(i)
    return values


def _additions(content: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, bool]:
    """add_bos_token and add_eos_token: as tokenizer_config.json says, else as tokenizer.json's template does it."""
    said = {key: config[key] for key in ("add_bos_token", "add_eos_token") if isinstance(config.get(key), bool)}
    processor = content.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing":
            said.setdefault("add_bos_token", "SpecialToken" in step["single"][0])
            said.setdefault("add_eos_token", "SpecialToken" in step["single"][-1])
    return said


def _chat_template(source: Path, config: Mapping[str, Any]) -> str | None:
    """The template, or the one of several that is called `default`."""
    template = config.get("chat_template")
    if template is None and (source / "chat_template.jinja").is_file():
        return (source / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):
        return next((t["template"] for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None
