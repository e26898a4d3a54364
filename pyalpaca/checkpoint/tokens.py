"""Tokenizer files beside a checkpoint: which there are, how many ids they know, and copying them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyalpaca.checkpoint.container.tensor_file import check_head, read_json
from pyalpaca.checkpoint.gguf_token_files import read_tokenizer, write_tokenizer

FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_CONFIG: dict[str, Any] = {
    "add_bos_token": True,
    "add_eos_token": False,
    **_SPECIALS,
    "clean_up_tokenization_spaces": False,
    "legacy": True,
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": None,
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
}


def find(*folders: Path) -> Path | None:
    """The first folder that holds a tokenizer (tokenizer.model or tokenizer.json)."""
    return next((f for f in folders if (f / "tokenizer.model").is_file() or (f / "tokenizer.json").is_file()), None)


def _content(token: Any) -> str | None:
    """The text of a special token as JSON files spell it: a string, or a record with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def count(folder: Path) -> int:
    """How many ids a folder's tokenizer knows: SentencePiece's pieces (or tokenizer.json's) and the tokens added to them.

    A special token that is named in a config alone (old Alpaca adapters: `[PAD]`) is one more id, as in transformers.
    """
    known: dict[str, int] = {}
    if (folder / "tokenizer.model").is_file():
        path = folder / "tokenizer.model"
        check_head(path, "a SentencePiece model")
        from sentencepiece import SentencePieceProcessor

        try:
            pieces = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path}: is not a SentencePiece model ({error}); download it again") from None
        known = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    if (folder / "tokenizer.json").is_file():
        fields = read_json(folder / "tokenizer.json")
        if not known:
            vocabulary = fields.get("model", {}).get("vocab", {})
            known = dict(vocabulary) if isinstance(vocabulary, dict) else {str(p[0]): i for i, p in enumerate(vocabulary)}
        known.update({t["content"]: t["id"] for t in fields.get("added_tokens", [])})
    specials: set[str] = set()
    for name in ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / name).is_file():
            continue
        fields = read_json(folder / name)
        if name == "added_tokens.json":
            known.update(fields)
            continue
        decoder = fields.get("added_tokens_decoder") or {}
        known.update({text: int(i) for i, t in decoder.items() if (text := _content(t))})
        named = [value for key, value in fields.items() if key.endswith("_token")]
        specials |= {text for t in (*named, *(fields.get("additional_special_tokens") or [])) if (text := _content(t))}
    return max(known.values(), default=-1) + 1 + len(specials - set(known))


def present(source: Path | None) -> list[str]:
    """The names of the files that `copy` would write from this folder (or GGUF file); ValueError if it is no tokenizer."""
    if source is None:
        return []
    if source.is_file():  # a GGUF file holds its tokenizer
        return list(read_tokenizer(source))
    needed: tuple[str, ...] = ()
    if (source / "tokenizer.model").is_file():
        check_head(source / "tokenizer.model", "a SentencePiece model")
        needed = ("tokenizer_config.json", "special_tokens_map.json")
    return [name for name in FILES if name in needed or (source / name).is_file()]


def copy(source: Path | None, out: Path) -> None:
    """Copy the tokenizer files there are into `out`, and write those that transformers needs beside a lone tokenizer.model.

    Old folders call the class LLaMATokenizer, which no release of transformers knows: it becomes LlamaTokenizer.
    """
    if source is None or source.resolve() == out.resolve():
        return
    if source.is_file():
        write_tokenizer(source, out)
        return
    for name in present(source):
        if not (source / name).is_file():
            write_json(out / name, _CONFIG if name == "tokenizer_config.json" else _SPECIALS)
        elif name == "tokenizer_config.json" and read_json(source / name).get("tokenizer_class") == "LLaMATokenizer":
            write_json(out / name, {**read_json(source / name), "tokenizer_class": "LlamaTokenizer"})
        else:
            shutil.copyfile(source / name, out / name)


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """A JSON file as transformers writes it: two spaces, a newline at the end."""
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
