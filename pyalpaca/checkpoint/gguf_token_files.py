"""The tokenizer in GGUF metadata as files again: tokenizer.model, or tokenizer.json for byte-level BPE, and their configs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
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
    llama_fields,
    sentencepiece_bytes,
)
from pyalpaca.checkpoint.gguf_tokens import OWN_FIELDS, OWN_PIECES, PRE_TOKENIZERS, ROLE_KEYS, ROLES

_SAME_CUT = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
_USUAL = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "gpt2": {}}


def has_tokenizer(metadata: Mapping[str, Value]) -> bool:
    """Whether a file holds a tokenizer."""
    return str(metadata.get("tokenizer.ggml.model", "none")) not in ("none", "no_vocab")


def special_ids(metadata: Mapping[str, Value]) -> dict[str, int]:
    """{role: id} of the special tokens bos, eos, unk, pad, as far as they are known."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    size = len(tokens) if isinstance(tokens, list) else 0
    found = dict(_USUAL.get(str(metadata.get("tokenizer.ggml.model")), {}))
    found |= {role: int(i) for role in ROLES if isinstance(i := metadata.get(ROLE_KEYS[role]), np.integer)}
    return {role: i for role, i in found.items() if 0 <= i < size}


def read_tokenizer(path: Path) -> dict[str, bytes]:
    """{name: content} of the files that stand for a GGUF file's tokenizer; none if it has no tokenizer.

    ValueError if it is of a kind that can't be expressed.
    """
    metadata = open_gguf_files(path).metadata
    if not has_tokenizer(metadata):
        return {}
    kind = str(metadata.get("tokenizer.ggml.model"))
    if kind not in ("llama", "gpt2"):
        raise ValueError(f"{path}: its tokenizer is of the kind {kind!r}, expected 'llama' or 'gpt2'; use the model's own files")
    tokens = _tokens(path, metadata, scored=kind == "llama")
    try:
        return (_sentencepiece_files if kind == "llama" else _json_files)(path, metadata, tokens)
    except UnicodeEncodeError:
        raise ValueError(f"{path}: its tokenizer holds texts that are no UTF-8; use the model's own files") from None


def write_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of the GGUF file `path` into `folder`; the errors are `read_tokenizer`'s."""
    for name, content in read_tokenizer(path).items():
        (folder / name).write_bytes(content)


@contextmanager
def tokenizer_folder(source: Path) -> Iterator[Path]:
    """A folder that holds a tokenizer's files: `source` itself, or a temporary one if it is a GGUF file."""
    if source.is_dir():
        yield source
        return
    with TemporaryDirectory(prefix="pyalpaca-") as folder:
        write_tokenizer(source, Path(folder))
        yield Path(folder)


def _tokens(path: Path, metadata: Mapping[str, Value], scored: bool) -> list[Token]:
    texts = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{path}: has no list of tokens, expected tokenizer.ggml.tokens; download it again")

    def numbers(key: str, default: float) -> list[float]:
        found = metadata.get(f"tokenizer.ggml.{key}", np.full(len(texts), default))
        if not isinstance(found, np.ndarray) or found.dtype == np.bool_ or len(found) != len(texts):
            raise ValueError(f"{path}: tokenizer.ggml.{key} does not fit the {len(texts)} tokens; download it again")
        listed: list[float] = found.tolist()
        return listed

    if scored and "tokenizer.ggml.scores" not in metadata:
        raise ValueError(f"{path}: has tokens without scores, expected tokenizer.ggml.scores; download it again")
    kinds = [int(kind) if kind in range(NORMAL, BYTE + 1) else NORMAL for kind in numbers("token_type", NORMAL)]
    return [Token(*token) for token in zip(texts, numbers("scores", 0.0), kinds, strict=True)]


def _flag(metadata: Mapping[str, Value], key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}")
    return value if isinstance(value, bool) else default


def _sentencepiece_files(path: Path, metadata: Mapping[str, Value], tokens: list[Token]) -> dict[str, bytes]:
    ids = special_ids(metadata)
    count, fields = metadata.get(OWN_PIECES), metadata.get(OWN_FIELDS)
    leading_space = _flag(metadata, "add_space_prefix", True)
    if isinstance(count, np.integer) and isinstance(fields, np.ndarray) and 0 < count <= len(tokens):
        pieces, rest = tokens[:count], fields.tobytes()
    else:
        pieces = [_as_sentencepiece(i, token, ids) for i, token in enumerate(_without_fill(tokens))]
        rest = llama_fields(pieces, ids.get("bos", 1), ids.get("eos", 2), ids.get("pad"), leading_space)
    try:
        model = sentencepiece_bytes(pieces, rest)
        from sentencepiece import SentencePieceProcessor

        SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{path}: its tokens make no SentencePiece model ({error}); use the model's own tokenizer files"
        ) from None
    added = {i: token for i, token in enumerate(tokens) if i >= len(pieces) and token.kind != UNUSED}
    config: dict[str, Any] = {
        "add_bos_token": _flag(metadata, "add_bos_token", True),
        "add_eos_token": _flag(metadata, "add_eos_token", False),
        "legacy": True,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    if not leading_space:
        config["add_prefix_space"] = False
    return {"tokenizer.model": model} | _configs(config, metadata, tokens, added)


def _without_fill(tokens: list[Token]) -> list[Token]:
    """Without the unused tokens at the end, which fill up a padded vocabulary."""
    size = len(tokens)
    while size > 1 and tokens[size - 1].kind == UNUSED:
        size -= 1
    return tokens[:size]


def _as_sentencepiece(i: int, token: Token, ids: Mapping[str, int]) -> Token:
    """A token as SentencePiece has it: just one is unknown, which llama.cpp's converter may have called a control token."""
    kind = UNKNOWN if i == ids.get("unk", 0) else CONTROL if token.kind == UNKNOWN else token.kind
    return Token(token.text, 0.0 if kind in (UNKNOWN, CONTROL) else token.score, kind)


def _json_files(path: Path, metadata: Mapping[str, Value], tokens: list[Token]) -> dict[str, bytes]:
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    pre = _SAME_CUT.get(pre, pre)
    merges = metadata.get("tokenizer.ggml.merges")
    if pre not in PRE_TOKENIZERS or not isinstance(merges, list):
        found = f"cuts text as {pre!r}" if pre not in PRE_TOKENIZERS else "has no merges"
        raise ValueError(
            f"{path}: its tokenizer {found}, which can't be written as tokenizer.json, expected {', '.join(PRE_TOKENIZERS)}; "
            "use the model's own tokenizer files"
        )
    ids = special_ids(metadata)
    add_bos = _flag(metadata, "add_bos_token", pre == "llama-bpe") and "bos" in ids
    add_eos = _flag(metadata, "add_eos_token", False) and "eos" in ids
    last = max((i for i, token in enumerate(tokens) if token.kind == NORMAL), default=-1)
    added = {i: token for i, token in enumerate(tokens) if token.kind in (CONTROL, USER_DEFINED)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **_added(token)} for i, token in added.items()],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": _template([tokens[ids["bos"]].text] * add_bos, [tokens[ids["eos"]].text] * add_eos, tokens),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token.text: i for i, token in enumerate(tokens[: last + 1])},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }
    config = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer.json": _json(content)} | _configs(config, metadata, tokens, added)


def _template(first: list[str], last: list[str], tokens: list[Token]) -> dict[str, Any] | None:
    """The step that puts special tokens around the ids of a text."""
    if not first and not last:
        return None
    ids = {token.text: i for i, token in enumerate(tokens)}

    def around(sequence: str, number: int) -> list[dict[str, Any]]:
        special = [[{"SpecialToken": {"id": text, "type_id": number}} for text in texts] for texts in (first, last)]
        return [*special[0], {"Sequence": {"id": sequence, "type_id": number}}, *special[1]]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in first + last},
    }


def _configs(
    config: dict[str, Any], metadata: Mapping[str, Value], tokens: list[Token], added: Mapping[int, Token]
) -> dict[str, bytes]:
    """tokenizer_config.json and special_tokens_map.json."""
    special = {f"{role}_token": tokens[i].text for role, i in sorted(special_ids(metadata).items())}
    config = {**config, **special, "model_max_length": 10**30}
    if added:
        config["added_tokens_decoder"] = {str(i): _added(token) for i, token in added.items()}
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return {"tokenizer_config.json": _json(dict(sorted(config.items()))), "special_tokens_map.json": _json(special)}


def _added(token: Token) -> dict[str, Any]:
    """A token beside the model, as tokenizer.json and tokenizer_config.json spell it."""
    return {
        "content": token.text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": token.kind == CONTROL,
    }


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
