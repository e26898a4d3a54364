"""Text to ids and back: SentencePiece models, extra tokens beside them, tokenizer.json, and text as it streams out of a model.

A special token written out in a text (`</s>`, `[PAD]`) is ordinary text here, never parsed: a user's words cannot end a
document. Ask for `bos` and `eos`, or use the ids.

A tokenizer.model is encoded by SentencePiece itself, as the models were trained. transformers 5 and a tokenizer.json that it
wrote give the same ids for LLaMA's own vocabulary, but not for one merged with Chinese pieces: those all have the score 0,
and where two of them overlap SentencePiece takes the leftmost, transformers the one with the lower id. Nor do they agree on
runs of spaces.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyalpaca.data.downloads import refuse_downloads

_SPACE = "▁"
_UNKNOWN_CHARACTER = "\ufffd"
_PADDING = ("[PAD]", "<pad>", "<PAD>")


@dataclass(frozen=True)
class AddedToken:
    """A token that a Hugging Face folder has beside the model; decoding may skip a special one."""

    text: str
    special: bool


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and its encoding. `vocab_size` counts pieces and added tokens; `pad_id` is None where there is none."""

    path: Path
    vocab_size: int
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int | None
    # Text without special tokens -> ids.
    encode_text: Callable[[str], list[int]] = field(repr=False)
    # Each id's UTF-8 bytes; a byte piece is a single byte, perhaps a part of a character. Ids that no text gives: b"".
    piece_bytes: tuple[bytes, ...] = field(repr=False)
    byte_ids: frozenset[int] = field(repr=False)
    # Special ids and how they are written: <s>, </s>, [PAD], ...
    special: Mapping[int, str] = field(repr=False)
    # Whether encoding puts a space before the text, which decoding takes away again.
    leading_space: bool = True

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, with the begin and end ids if asked for."""
        ids = self.encode_text(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. ValueError for an id outside the vocabulary."""
        add, end = stream_decoder(self, skip_special)
        return "".join([add(int(i)) for i in ids]) + end()


def stream_decoder(tokenizer: Tokenizer, skip_special: bool = True) -> tuple[Callable[[int], str], Callable[[], str]]:
    """Two functions: `add(id)` gives the text that is now certain (often ""), `end()` gives what is left.

    All of it joined equals `tokenizer.decode` of all ids; a character whose bytes come one by one is given when it is whole.
    """
    pending = b""
    at_start = tokenizer.leading_space

    def add(token: int) -> str:
        nonlocal pending, at_start
        if not 0 <= token < tokenizer.vocab_size:
            raise ValueError(
                f"{tokenizer.path}: no piece has id {token}, the vocabulary ends at {tokenizer.vocab_size - 1}; "
                "use the tokenizer that belongs to the model"
            )
        if token in tokenizer.special:
            if skip_special:
                return ""
            at_start = False
            return end() + tokenizer.special[token]
        piece = tokenizer.piece_bytes[token]
        if at_start and token not in tokenizer.byte_ids:
            piece = piece.removeprefix(b" ")
        at_start = False
        text, pending = _whole_characters(pending + piece)
        return text

    def end() -> str:
        nonlocal pending
        text, pending = _UNKNOWN_CHARACTER * len(pending), b""
        return text

    return add, end


def _whole_characters(data: bytes) -> tuple[str, bytes]:
    """The text of `data` and the start of a last character that still lacks bytes; each wrong byte is one U+FFFD."""
    text = ""
    while data:
        try:
            return text + data.decode(), b""
        except UnicodeDecodeError as error:
            text += data[: error.start].decode()
            data = data[error.start :]
            if error.reason == "unexpected end of data":
                return text, data
            text, data = text + _UNKNOWN_CHARACTER, data[1:]
    return text, b""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer.model, a tokenizer.json, or a folder that holds one of them (tokenizer.model is preferred).

    In a folder, added_tokens.json and tokenizer_config.json may add tokens beyond the model, such as [PAD].
    FileNotFoundError if there is none; ValueError if the file is not what its name says.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        file = next((path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()), path)
        if file == path:
            raise FileNotFoundError(f"{path}: holds neither tokenizer.model nor tokenizer.json; copy the model's tokenizer there")
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a tokenizer.model or a folder that holds one; check the path")
    added = _added_tokens(file.parent) if path.is_dir() else {}
    return _open_json(file, added) if file.suffix == ".json" else _open_sentencepiece(file, added)


def _open_sentencepiece(file: Path, added: Mapping[int, AddedToken]) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    head = file.read_bytes()[:64]
    refuse_downloads(file, head, "a SentencePiece model")
    try:
        model: Any = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{file}: SentencePiece cannot read its {file.stat().st_size:,} bytes, expected a model of it; download it again"
        ) from error
    size = model.get_piece_size()
    pieces = model.id_to_piece(list(range(size)))
    controls = {i: pieces[i] for i in range(size) if model.is_control(i) or model.is_unknown(i)}
    return _tokenizer(
        file,
        pieces=pieces,
        byte_ids={i for i in range(size) if model.is_byte(i)},
        controls=controls,
        added=added,
        ids={"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id()},
        encode_text=model.encode,
    )


def _open_json(file: Path, added: Mapping[int, AddedToken]) -> Tokenizer:
    try:
        from tokenizers import Tokenizer as JsonTokenizer
    except ImportError as error:
        raise ValueError(
            f"{file}: reading a tokenizer.json needs the package `tokenizers`, which is not installed; "
            "install it, or put the model's tokenizer.model beside it"
        ) from error
    refuse_downloads(file, file.read_bytes()[:64], "a tokenizer.json")
    try:
        model = JsonTokenizer.from_file(str(file))
        content = json.loads(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: is not a tokenizer.json ({error}); download it again") from error
    if not content["model"].get("byte_fallback"):
        raise ValueError(
            f"{file}: holds a {content['model'].get('type')} model without byte fallback, "
            "expected a tokenizer of the LLaMA family; use the model's tokenizer.model"
        )
    model.encode_special_tokens = True
    vocabulary = model.get_vocab(with_added_tokens=True)
    pieces = [""] * (max(vocabulary.values()) + 1)
    for piece, i in vocabulary.items():
        pieces[i] = piece
    controls = {t["id"]: t["content"] for t in content["added_tokens"] if t["special"]}
    return _tokenizer(
        file,
        pieces=pieces,
        byte_ids={i for piece, i in vocabulary.items() if len(piece) == 6 and piece.startswith("<0x")},
        controls=controls,
        added=added,
        ids={"bos": vocabulary.get("<s>", -1), "eos": vocabulary.get("</s>", -1), "unk": vocabulary.get("<unk>", 0), "pad": -1},
        encode_text=lambda text: model.encode(text, add_special_tokens=False).ids,
    )


def _tokenizer(
    file: Path,
    pieces: list[str],
    byte_ids: set[int],
    controls: dict[int, str],
    added: Mapping[int, AddedToken],
    ids: Mapping[str, int],
    encode_text: Callable[[str], list[int]],
) -> Tokenizer:
    for name, written in (("bos", "<s>"), ("eos", "</s>")):
        if ids[name] < 0:
            raise ValueError(
                f"{file}: has no {name} token ({written}), expected one as LLaMA's has; use the model's own tokenizer"
            )
    special = controls | {i: token.text for i, token in added.items() if token.special}
    size = max([len(pieces) - 1, *added]) + 1
    texts = [_piece_bytes(piece, i in byte_ids) for i, piece in enumerate(pieces)] + [b""] * (size - len(pieces))
    for i in range(len(pieces), size):
        texts[i] = added[i].text.encode() if i in added else b""
    # A merged Chinese-Alpaca model has [PAD] as an ordinary piece: by its name it is the padding all the same.
    names = {text: i for i, text in enumerate(pieces) if text in _PADDING} | {text: i for i, text in special.items()}
    pad = ids["pad"] if ids["pad"] >= 0 else next((names[name] for name in _PADDING if name in names), None)
    if pad is not None and pad not in special:
        special[pad] = pieces[pad]
    probe = encode_text("a")
    return Tokenizer(
        path=file,
        vocab_size=size,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        unk_id=ids["unk"],
        pad_id=pad,
        encode_text=encode_text,
        piece_bytes=tuple(texts),
        byte_ids=frozenset(byte_ids),
        special=special,
        leading_space=bool(probe) and pieces[probe[0]].startswith(_SPACE),
    )


def _piece_bytes(piece: str, is_byte: bool) -> bytes:
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(_SPACE, " ").encode()


def _added_tokens(folder: Path) -> dict[int, AddedToken]:
    """Tokens that a Hugging Face folder has beyond the model. ValueError if a file is not JSON of that form."""
    added: dict[int, AddedToken] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if name == "added_tokens.json":
                added |= {int(i): AddedToken(str(text), True) for text, i in content.items()}
            else:
                tokens = content.get("added_tokens_decoder", {})
                added |= {int(i): AddedToken(str(t["content"]), bool(t.get("special", True))) for i, t in tokens.items()}
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file}: is not the JSON that Hugging Face writes there ({error}); download it again or remove it"
            ) from error
    return added
