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
    Piece,
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
    if (source / "tokenizer.model").is_file():
        pieces, rest = read_sentencepiece(source / "tokenizer.model")
        values: dict[str, Value] = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        merges: list[str] = []
        leading_space = has_leading_space(rest)
    else:
        values, pieces, merges = _from_json(source / "tokenizer.json", vocab_size)
        rest, leading_space = b"", _json_leading_space(source / "tokenizer.json")
    config = _config(source)
    tokens = _table(source, pieces, _added_tokens(source, config, pieces), vocab_size)
    values["tokenizer.ggml.tokens"] = [token.text for token in tokens]
    if values["tokenizer.ggml.model"] == "llama":
        values["tokenizer.ggml.scores"] = np.array([token.score for token in tokens], np.float32)
    values["tokenizer.ggml.token_type"] = np.array([token.kind for token in tokens], np.int32)
    if merges:
        values["tokenizer.ggml.merges"] = merges
    values |= _roles(config, fields, tokens)
    values |= {f"tokenizer.ggml.{key}": on for key, on in _additions(source, config).items()}
    if not config.get("add_prefix_space", leading_space):
        values["tokenizer.ggml.add_space_prefix"] = False
    if template := _chat_template(source, config):
        values["tokenizer.chat_template"] = template
    if rest and sentencepiece_bytes(tokens[: len(pieces)], rest) == (source / "tokenizer.model").read_bytes():
        values[OWN_PIECES] = np.uint32(len(pieces))
        values[OWN_FIELDS] = np.frombuffer(rest, np.uint8)
    return values


def _taken_over(path: Path, vocab_size: int) -> dict[str, Value]:
    metadata = open_gguf_files(path).metadata
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    if isinstance(tokens, list) and tokens and len(tokens) != vocab_size:
        raise ValueError(f"{path}: its tokenizer has {len(tokens)} tokens, but the model {vocab_size}; they must be equal")
    return {key: value for key, value in metadata.items() if key.startswith(("tokenizer.", "pyalpaca.sentencepiece."))}


def _from_json(path: Path, vocab_size: int) -> tuple[dict[str, Value], list[Piece], list[str]]:
    """What a tokenizer.json without SentencePiece's file gives: the first keys, the pieces, the merges that are written."""
    content = read_json(path)
    try:
        model = content["model"]
        vocabulary = {str(text): int(i) for text, i in model["vocab"].items()}
        pairs = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
        names = {i: text for text, i in vocabulary.items()}
        size = min(max(names) + 1, vocab_size)
        pieces = [Piece(names[i]) if i in names else Piece(f"[PAD{i}]", -10000.0, UNUSED) for i in range(size)]
        ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(pairs)))}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: is not the tokenizer.json of a BPE model ({error!r}); use the model's own tokenizer") from None
    if model.get("byte_fallback"):
        special = {str(token["content"]) for token in content.get("added_tokens", []) if token.get("special")}
        for i, piece in enumerate(pieces):
            kind = UNKNOWN if piece.text == model.get("unk_token") else CONTROL if piece.text in special else piece.kind
            if len(piece.text) == 6 and piece.text.startswith("<0x"):
                kind = BYTE
            pieces[i] = Piece(piece.text, -float(ranks.get(piece.text, len(pairs))) if kind == NORMAL else piece.score, kind)
        return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}, pieces, []
    pre = next((name for name, form in PRE_TOKENIZERS.items() if _same_cut(content.get("pre_tokenizer"), form)), None)
    if pre is None:
        raise ValueError(
            f"{path}: cuts text in a way that has no known name in llama.cpp, expected {', '.join(PRE_TOKENIZERS)} or a "
            "SentencePiece tokenizer; convert without the tokenizer's files beside the model"
        )
    # A space within a merge would end its left half.
    merges = [" ".join(half.replace(" ", "Ġ") for half in pair) for pair in pairs]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}, pieces, merges


def _json_leading_space(path: Path) -> bool:
    """Whether a tokenizer.json of SentencePiece's kind puts a space before the text."""
    content = read_json(path)
    steps: list[Any] = []
    for part in (content.get("normalizer"), content.get("pre_tokenizer")):
        steps += (part.get("normalizers") or part.get("pretokenizers") or [part]) if isinstance(part, dict) else []
    scheme = {"Prepend": lambda step: True, "Metaspace": lambda step: step.get("prepend_scheme", "always") != "never"}
    return any(step.get("type") in scheme and scheme[step["type"]](step) for step in steps)


def _same_cut(found: Any, form: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer is this one; fields that are not in it have their defaults, `trim_offsets` cuts nothing."""
    if not isinstance(found, dict) or found.get("type") != form["type"]:
        return False
    if "pretokenizers" in form:
        steps = found.get("pretokenizers", [])
        wanted = form["pretokenizers"]
        return len(steps) == len(wanted) and all(_same_cut(a, b) for a, b in zip(steps, wanted, strict=True))
    return all(found.get(key, default) == default for key, default in form.items() if key != "trim_offsets")


def _config(folder: Path) -> dict[str, Any]:
    """special_tokens_map.json and tokenizer_config.json as one, special tokens as texts."""
    fields: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            fields |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    return {
        key: value.get("content") if isinstance(value, dict) and key.endswith("_token") else value
        for key, value in fields.items()
    }


def _added_tokens(folder: Path, config: Mapping[str, Any], pieces: list[Piece]) -> dict[int, tuple[str, bool]]:
    """{id: (text, whether it is special)} of the tokens that are named beside the model.

    One that only a config names, such as old Alpaca's `[PAD]`, gets the next id, as in transformers.
    """
    added: dict[int, tuple[str, bool]] = {}
    try:
        if (folder / "tokenizer.json").is_file():
            listed = read_json(folder / "tokenizer.json").get("added_tokens") or []
            added |= {int(t["id"]): (str(t["content"]), bool(t.get("special"))) for t in listed}
        if (folder / "added_tokens.json").is_file():
            added |= {int(i): (str(text), False) for text, i in read_json(folder / "added_tokens.json").items()}
        decoder = config.get("added_tokens_decoder") or {}
        added |= {int(i): (str(t["content"]), bool(t.get("special"))) for i, t in decoder.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder}: its added tokens are not as Hugging Face writes them ({error!r}); download them again"
        ) from None
    known = {piece.text for piece in pieces} | {text for text, _ in added.values()}
    named = [text for role in ROLES if isinstance(text := config.get(f"{role}_token"), str) and text]
    for text in named:
        if text not in known:
            known.add(text)
            added[max(len(pieces), max(added, default=-1) + 1)] = text, True
    return {i: (text, special or text in named) for i, (text, special) in added.items()}


def _table(source: Path, pieces: list[Piece], added: Mapping[int, tuple[str, bool]], vocab_size: int) -> list[Piece]:
    """A token for each row of the model; ids beyond are left out. ValueError if two have the same text."""
    table = (pieces + [Piece(f"[PAD{i}]", -10000.0, UNUSED) for i in range(len(pieces), vocab_size)])[:vocab_size]
    for i, (text, special) in added.items():
        if not 0 <= i < vocab_size or (table[i].text == text and table[i].kind in (UNKNOWN, CONTROL, USER_DEFINED)):
            continue
        kind = CONTROL if special or (text.startswith("<|") and text.endswith("|>")) else USER_DEFINED
        table[i] = Piece(text if special else text.replace("▁", " "), -1000.0, kind)
    seen: dict[str, int] = {}
    for i, token in enumerate(table):
        if seen.setdefault(token.text, i) != i:
            raise ValueError(
                f"{source}: the tokens {seen[token.text]} and {i} are both {token.text!r}, which llama.cpp can't load; "
                "use the tokenizer that belongs to the model"
            )
    return table


def _roles(config: Mapping[str, Any], fields: Mapping[str, Any], tokens: list[Piece]) -> dict[str, Value]:
    """The ids of the special tokens: by the tokenizer's files, else by config.json, else as in LLaMA."""
    ids = {token.text: i for i, token in enumerate(tokens)}
    usual = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": ""}
    values: dict[str, Value] = {}
    for role in ROLES:
        stated = fields.get(f"{role}_token_id")
        by_config = stated if isinstance(stated, int) and 0 <= stated < len(tokens) else ids.get(usual[role])
        i = ids.get(config.get(f"{role}_token") or "", by_config)
        if i is not None:
            values[ROLE_KEYS[role]] = np.uint32(i)
    return values


def _additions(source: Path, config: Mapping[str, Any]) -> dict[str, bool]:
    """add_bos_token and add_eos_token: as tokenizer_config.json says, else as tokenizer.json's template does it."""
    said = {key: config[key] for key in ("add_bos_token", "add_eos_token") if isinstance(config.get(key), bool)}
    path = source / "tokenizer.json"
    processor = (read_json(path).get("post_processor") or {}) if path.is_file() else {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing" and (single := step.get("single")):
            said.setdefault("add_bos_token", "SpecialToken" in single[0])
            said.setdefault("add_eos_token", "SpecialToken" in single[-1])
    return said


def _chat_template(source: Path, config: Mapping[str, Any]) -> str | None:
    """The template, or the one of several that is called `default`."""
    template = config.get("chat_template")
    if template is None and (source / "chat_template.jinja").is_file():
        return (source / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):
        return next((t["template"] for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None
