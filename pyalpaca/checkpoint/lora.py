"""LoRA adapters checked against their base and against each other, and merged in a view.

The merge is bit for bit the original scripts': for every tensor and every adapter in order, a full tensor replaces it (cast to
fp16); factors add T(fp32(B) @ fp32(A)) * (lora_alpha / r) to it in fp32, and the sum is rounded to fp16 after each adapter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pyalpaca.checkpoint import tokens
from pyalpaca.checkpoint.adapter import CONFIG, Adapter, open_adapter
from pyalpaca.checkpoint.canonical import Reader
from pyalpaca.checkpoint.container.tensor_file import Piece
from pyalpaca.checkpoint.published import published
from pyalpaca.model import parameters, whole_slice
from pyalpaca.ops import lora_merge

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def merged(base: Reader, paths: Sequence[Path]) -> Reader:
    """A view of `base` with the adapters merged in, in the given order; all tensors fp16, nothing of `base` is read yet.

    The vocabulary and the tokenizer are the last adapter's that has one. A base in another type than fp16 is rounded where no
    adapter touches it, as the original does by loading the base in fp16.
    Raises ValueError for adapters that match nothing, are in the wrong order, incomplete or not finite, lack the embeddings that
    their tokenizer needs, have a tokenizer that does not fit or other shapes than the base, and for published ones that are
    known to go on another base.
    """
    adapters = [open_adapter(path) for path in paths]
    for i, path in enumerate(paths):
        if any(path.resolve() == other.resolve() for other in paths[:i]):
            raise ValueError(f"{path}: is given twice, an adapter is merged once; name each adapter once, in order")
    _check_vocabularies(base, adapters)
    vocab_size = base.config.vocab_size
    for adapter in adapters:
        vocab_size = (adapter.full_shape("model.embed_tokens.weight") or (vocab_size,))[0]
        _check_targets(base, adapter, vocab_size)
    _check_recipe(base, adapters)
    for adapter in adapters:
        _check_finite(adapter)
    config = replace(base.config, vocab_size=vocab_size)
    shapes = {p.name: p.shape for p in parameters(config)}

    def fetch(name: str, piece: Piece | None) -> Tensor:
        # What comes before the last full tensor has no effect.
        last = max((i for i, adapter in enumerate(adapters) if name in adapter.full), default=None)
        weight = base.read(name, piece) if last is None else adapters[last].file.read(adapters[last].full[name], piece)
        weight = weight.to(torch.float16)
        factors = [_factors(adapter, name, piece) for adapter in adapters[last or 0 :] if name in adapter.factors]
        return lora_merge(weight, factors) if factors else weight

    return replace(
        base,
        config=config,
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, torch.float16),
        fetch=fetch,
        tokenizer=_tokenizer(base, adapters),
    )


def _factors(adapter: Adapter, name: str, piece: Piece | None) -> tuple[Tensor, Tensor, float]:
    """What the adapter adds to a weight (or its piece), as lora_merge takes it: T(B @ A) * lora_alpha / r."""
    factors = adapter.factors[name]
    a, b = (adapter.file.read(key, None).float() for key in (factors.a, factors.b))
    left, right = (a.T, b.T) if factors.transpose else (b, a)
    if piece is not None:
        left, right = (whole_slice(left, piece), right) if piece[0] == 0 else (left, whole_slice(right, piece))
    return left, right, factors.scale


def describe_merge(names: Iterable[str], paths: Sequence[str | Path]) -> list[str]:
    """One line for each tensor that an adapter replaces or adds to, in order."""
    adapters = [open_adapter(Path(path)) for path in paths]
    lines = []
    for name in names:
        for adapter in adapters:
            if name in adapter.full:
                lines.append(f"{name}: replaced by {adapter.path}")
            if name in adapter.factors:
                lines.append(f"{name}: B @ A * {adapter.factors[name].scale:g} added from {adapter.path}")
    return lines


def _check_targets(base: Reader, adapter: Adapter, rows: int) -> None:
    """Every key matches a tensor of the base, and in shape; the vocabulary has `rows` rows once the adapter is in."""
    where = adapter.file.path
    unknown = [name for name in (*adapter.full, *adapter.factors) if name not in base.shapes]
    if unknown:
        raise ValueError(
            f"{where}: {len(unknown)} of {len(adapter.full) + len(adapter.factors)} tensors match nothing in {base.path} "
            f"({unknown[0]} is one); is this the adapter for a model of {base.config.num_layers} layers?"
        )
    if not adapter.full and not adapter.factors:
        raise ValueError(f"{where}: holds no tensors, nothing to merge; download the adapter's weights again")
    _check_complete(base, adapter)
    expected = {name: (rows, *s[1:]) if name in _VOCABULARY else s for name, s in base.shapes.items()}
    for name, key in adapter.full.items():
        if adapter.file.shapes[key] != expected[name]:
            raise ValueError(
                f"{where}: {name} is {adapter.file.shapes[key]}, expected {expected[name]}; "
                f"is this the adapter for a model of this size?"
            )
    for name, factors in adapter.factors.items():
        (r, into), (out, r_b) = adapter.file.shapes[factors.a], adapter.file.shapes[factors.b]
        shape = (into, out) if factors.transpose else (out, into)
        if r != r_b or shape != expected[name]:
            raise ValueError(
                f"{where}: lora_B @ lora_A of {name} is ({out}, {r_b}) @ ({r}, {into}), the model has {expected[name]}; "
                f"is this the adapter for a model of this size?"
            )


def _check_complete(base: Reader, adapter: Adapter) -> None:
    """ValueError if the file lacks something that the config names: a download or a distributed run's save was cut short."""
    for name in base.names:
        module = name.removesuffix(".weight")
        expected = None
        if any(module == t or module.endswith(f".{t}") for t in adapter.targets) and name not in adapter.factors:
            expected = "target_modules", "factors for"
        if any(module == m or module.endswith(f".{m}") for m in adapter.whole):
            expected = None if name in adapter.full else ("modules_to_save", "whole")
        if expected:
            raise ValueError(
                f"{adapter.file.path}: holds no {expected[1]} {name}, which {expected[0]} in {CONFIG} names; "
                f"download the adapter's weights again"
            )


def _check_vocabularies(base: Reader, adapters: Sequence[Adapter]) -> None:
    """Embedding, head, tokenizer and order of the adapters fit together."""
    rows, before = base.config.vocab_size, base.path
    for adapter in adapters:
        have = {name: shape[0] for name in _VOCABULARY if (shape := adapter.full_shape(name))}
        if base.config.tie_embeddings and "lm_head.weight" in have:
            raise ValueError(
                f"{adapter.path}: has an lm_head of its own, but the embeddings of {base.path} are tied; untie them first"
            )
        new, head = (have.get(name, rows) for name in _VOCABULARY)
        if new != head and not base.config.tie_embeddings:
            raise ValueError(
                f"{adapter.path}: embed_tokens would have {new} rows and lm_head {head}, expected as many; "
                f"is the adapter complete?"
            )
        size = tokens.count(adapter.tokenizer) if adapter.tokenizer else None
        if new < rows:
            raise ValueError(
                f"{adapter.path}: has a vocabulary of {new}, {before} before it has {rows}; the adapters are in the wrong order, "
                f"the one with the smaller vocabulary (LLaMA-Plus) goes before the larger (Alpaca-Plus)"
            )
        if size is not None and not have and size > rows:
            raise ValueError(
                f"{adapter.tokenizer}: the tokenizer knows {size} tokens, but the adapter has no embeddings and the model "
                f"before it has {rows}; is an adapter missing before it, or its embed_tokens?"
            )
        if size is not None and have and not _fits(size, new):
            raise ValueError(
                f"{adapter.tokenizer}: the tokenizer knows {size} tokens, but the adapter's embed_tokens has {new} rows; "
                f"put the tokenizer files that belong to this adapter beside it"
            )
        rows, before = new, adapter.path
    last = _tokenizer(base, adapters)
    if rows == base.config.vocab_size:
        return
    if last is None:
        raise ValueError(
            f"{before}: brings a vocabulary of {rows}, but no tokenizer for it; put the adapter's tokenizer files beside it"
        )
    if not _fits(size := tokens.count(last), rows):
        raise ValueError(
            f"{last}: the tokenizer knows {size} tokens, but the merged model has {rows}; "
            f"put the last adapter's tokenizer files beside it"
        )


def _fits(size: int, rows: int) -> bool:
    """Whether a tokenizer of `size` ids belongs to an embedding of `rows`: as many, or padded to a multiple of 8."""
    return size == rows or (size < rows < size + 128 and rows % 8 == 0)


def _tokenizer(base: Reader, adapters: Sequence[Adapter]) -> Path | None:
    """The last adapter's tokenizer, of those that have one; else the base's."""
    return next((a.tokenizer for a in reversed(adapters) if a.tokenizer), base.tokenizer)


_PLUS = re.compile(r"Chinese-Alpaca-(Plus|Pro)-(\w+)")


def _check_recipe(base: Reader, adapters: Sequence[Adapter]) -> None:
    """ValueError for a published adapter on another base than it was trained on; nothing in its files says which that is.

    Alpaca-Plus and -Pro were trained on LLaMA-Plus and add a [PAD] to its vocabulary; all others bring LLaMA its Chinese.
    """
    rows, before = base.config.vocab_size, None
    with ThreadPoolExecutor() as pool:  # a gigabyte is hashed in about a second
        names = list(pool.map(_published_as, adapters))
    for adapter, name in zip(adapters, names, strict=True):
        new = (adapter.full_shape("model.embed_tokens.weight") or (rows,))[0]
        plus = _PLUS.fullmatch(name or "")
        needed = f"Chinese-LLaMA-Plus-{plus[2]}" if plus else None
        fits = before == needed if before else new == rows + 1 if needed else new > rows + 1
        if name and not fits:
            found = f"{before} is merged before it" if before else f"the model before it has a vocabulary of {rows}"
            raise ValueError(
                f"{adapter.path}: is {name}, which belongs on {needed or 'LLaMA itself'}, but {found}; "
                f"merge {needed + ' before it' if needed else 'it into the original LLaMA'}"
            )
        rows, before = new, name or before


def _published_as(adapter: Adapter) -> str | None:
    """The name under which an adapter file was published, known by its sha256; all of those hold embeddings."""
    if adapter.file.path.suffix != ".bin" or "model.embed_tokens.weight" not in adapter.full:
        return None
    known = {row.sha256: row.model for row in published() if row.kind == "lora"}
    total = hashlib.sha256()
    with adapter.file.path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return known.get(total.hexdigest())


def _check_finite(adapter: Adapter) -> None:
    """ValueError if an adapter holds NaN or infinity: its training diverged, and every model it is merged into is lost."""
    for key in adapter.file.shapes:
        low, high = torch.aminmax(adapter.file.read(key, None))  # a NaN anywhere is both; far faster than isfinite
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(f"{adapter.file.path}: {key} holds NaN or infinity; the training diverged, use an earlier adapter")
