"""The table of published sha256 that ships with the package: its models, and which of its files may hold which tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files

from pyalpaca.checkpoint.sizes import size_by_name

_VOCABULARIES = {"LLaMA": 32000, "Chinese-LLaMA": 49953, "Chinese-Alpaca": 49954}
# What the tensors of each kind of file are called, and those of them that have a row for each piece of the vocabulary.
_NAMES = {
    "base-pth": r"(layers|tok_embeddings|norm|output)\.",
    "merged-pth": r"(layers|tok_embeddings|norm|output)\.",
    "base-hf": r"(model|lm_head)\.",
    "lora": r"base_model\.",
}
_WHOLE_VOCABULARY = re.compile(r"tok_embeddings\.weight|.*\b(embed_tokens|lm_head)\.weight")


@dataclass(frozen=True)
class Published:
    """A row of the table. sha256: hex, or `TBA` where it was announced and never published; `file` is then a pattern."""

    model: str
    file: str
    sha256: str
    kind: str

    @property
    def announced(self) -> bool:
        return self.sha256 == "TBA"

    def __str__(self) -> str:
        return f"{self.model} {self.file} ({self.kind})"

    def may_hold(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether tensors of these names and shapes can be those of the file: of its kind, its model's width and vocabulary."""
        names = _NAMES.get(self.kind)
        if names is None or not all(re.match(names, key) for key in shapes if not key.startswith("rope.")):
            return False
        size = size_by_name(self.model.rpartition("-")[2])
        if size is not None and all(size.hidden_size not in shape for shape in shapes.values()):
            return False
        vocabulary = _VOCABULARIES.get(family(self.model))
        return all(vocabulary in (None, shape[0]) for key, shape in shapes.items() if shape and _WHOLE_VOCABULARY.fullmatch(key))


def published() -> tuple[Published, ...]:
    """The table: 60 published hashes and 4 that were announced only."""
    lines = files("pyalpaca.checkpoint").joinpath("data", "sha256.tsv").read_text(encoding="utf-8").splitlines()
    return tuple(Published(*line.split("\t")) for line in lines[1:])


def family(model: str) -> str:
    """The name under which the table has the model's tokenizer: Chinese-Alpaca of Chinese-Alpaca-Plus-7B."""
    return re.sub(r"(-Plus|-Pro)?-\d+B$", "", model)


def model_named(name: str, table: Sequence[Published]) -> str:
    """The table's spelling of a model's name; Meta says 30B for 33B. ValueError if it has no such model."""
    known = {row.model.lower(): row.model for row in table}
    key = re.sub(r"\b30b$", "33b", name.strip().lower())
    if key not in known:
        near = get_close_matches(key, known, n=3, cutoff=0.5) or list(known)[:3]
        raise ValueError(
            f"model {name!r}: not in the table of published hashes; it has {', '.join(known[k] for k in near)} and others, "
            "in sizes 7B, 13B and 33B"
        )
    return known[key]
