"""LoRA adapters as PEFT writes them: opened, checked against their base, merged in a view, written.

The merge is bit for bit the original scripts': for every tensor and every adapter in order, a full tensor replaces it (cast to
fp16); factors add T(fp32(B) @ fp32(A)) * (lora_alpha / r) to it in fp32, and the sum is rounded to fp16 after each adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyalpaca.checkpoint import tokens
from pyalpaca.checkpoint.canonical import Piece, Reader, own
from pyalpaca.checkpoint.pth import TensorFile, open_tensors, read_json, write_safetensors
from pyalpaca.checkpoint.tokens import write_json
from pyalpaca.files import atomic_folder
from pyalpaca.model import parameters, whole_slice

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class Adapter:
    """One adapter, opened: which canonical tensors it replaces (`full`) or adds to (`factors`), and by which keys of its file."""

    path: Path
    file: TensorFile
    r: int
    scale: float
    transpose: bool
    full: Mapping[str, str]
    factors: Mapping[str, tuple[str, str]]
    tokenizer: Path | None

    def full_shape(self, name: str) -> tuple[int, ...] | None:
        return self.file.shapes[self.full[name]] if name in self.full else None


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (path / CONFIG).is_file() or any((path / name).is_file() for name in _FILES)


def open_adapter(path: Path) -> Adapter:
    """Open an adapter folder; ValueError or FileNotFoundError for what is missing, damaged or unknown to the merge."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: not found, expected the folder of a LoRA adapter; check the path")
    if not (path / CONFIG).exists():
        raise FileNotFoundError(f"{path / CONFIG}: not found, so {path.name} is no LoRA adapter; give the folder that PEFT wrote")
    fields = read_json(path / CONFIG)
    for key in ("r", "lora_alpha"):
        value = fields.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"{path / CONFIG}: {key} is {value!r}, expected a positive number; restore the adapter's own config")
    for key in ("use_dora", "rank_pattern", "alpha_pattern"):
        if fields.get(key):
            raise ValueError(
                f"{path / CONFIG}: {key} is {fields[key]!r}, which this merge does not know; merge this adapter with peft"
            )
    name = next((n for n in _FILES if (path / n).is_file()), None)
    if name is None:
        raise FileNotFoundError(f"{path / _FILES[1]}: not found, expected {' or '.join(_FILES)}; download the adapter's weights")
    file = open_tensors(path / name)
    full, factors = _parse_keys(file)
    r = int(fields["r"])
    scale = fields["lora_alpha"] / (r**0.5 if fields.get("use_rslora") else r)
    for module, (a, _) in factors.items():
        if file.shapes[a][0] != r:
            raise ValueError(
                f"{file.path}: {module} has rank {file.shapes[a][0]}, but {CONFIG} says r = {r}; restore the adapter's own config"
            )
    return Adapter(path, file, r, scale, bool(fields.get("fan_in_fan_out")), full, factors, tokens.find(path))


def canonical_key(key: str) -> str:
    """A key of an adapter file without PEFT's decorations: `base_model.model.`, `modules_to_save.`, `default.`, ..."""
    for prefix in ("base_model.model.", "base_model."):
        if key.startswith(prefix):
            key = key.removeprefix(prefix)
            break
    return re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)", "", key)


def _parse_keys(file: TensorFile) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """({canonical name: key of the full tensor}, {canonical name: (key of A, key of B)})."""
    full: dict[str, str] = {}
    halves: dict[str, dict[str, str]] = {}
    for key in file.shapes:
        name = canonical_key(key)
        if name.endswith("rotary_emb.inv_freq") or ".original_module." in name:
            continue  # buffers, and the copy of the base that old PEFT kept beside a saved module
        match = _FACTOR.fullmatch(name)
        group = halves.setdefault(f"{match[1]}.weight", {}) if match else full
        place = match[2] if match else name
        if place in group:
            raise ValueError(f"{file.path}: {key} and {group[place]} are the same tensor; remove one of them")
        group[place] = key
    for name, pair in halves.items():
        if len(pair) < 2:
            raise ValueError(
                f"{file.path}: {name} has lora_{next(iter(pair))} alone, expected lora_A and lora_B; download it again"
            )
    return full, {name: (pair["A"], pair["B"]) for name, pair in halves.items()}


def merged(base: Reader, paths: Sequence[Path]) -> Reader:
    """A view of `base` with the adapters merged in, in the given order; all tensors fp16, nothing is read yet.

    The vocabulary and the tokenizer are the last adapter's that has one. A base in another type than fp16 is rounded where no
    adapter touches it, as the original does by loading the base in fp16.
    Raises ValueError, before anything is read or written, for adapters that match nothing, are in the wrong order, lack the
    embeddings that their tokenizer needs, have a tokenizer that does not fit, or other shapes than the base.
    """
    adapters = [open_adapter(path) for path in paths]
    _check_vocabularies(base, adapters)
    vocab_size = base.config.vocab_size
    for adapter in adapters:
        vocab_size = (adapter.full_shape("model.embed_tokens.weight") or (vocab_size,))[0]
        _check_targets(base, adapter, vocab_size)
    config = replace(base.config, vocab_size=vocab_size)
    shapes = {p.name: p.shape for p in parameters(config)}

    def fetch(name: str, piece: Piece | None) -> Tensor:
        # What comes before the last full tensor has no effect.
        last = max((i for i, adapter in enumerate(adapters) if name in adapter.full), default=None)
        if last is None:
            weight, todo = base.read(name, piece), adapters
        else:
            weight, todo = adapters[last].file.read(adapters[last].full[name], piece).to(torch.float16), adapters[last:]
        for adapter in todo:
            if name in adapter.factors:
                # The product is made whole and then cut: BLAS may sum a smaller one in another order.
                weight = (weight.float() + whole_slice(delta(adapter, name), piece)).to(torch.float16)
        return weight.to(torch.float16)

    return replace(
        base,
        config=config,
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, torch.float16),
        fetch=fetch,
        tokenizer=_tokenizer(base, adapters),
    )


def delta(adapter: Adapter, name: str) -> Tensor:
    """What an adapter adds to a tensor, fp32 (out, in): T(B @ A) * lora_alpha / r."""
    a, b = (adapter.file.read(key, None).float() for key in adapter.factors[name])
    product = b @ a
    return (product.T if adapter.transpose else product) * adapter.scale


def describe_merge(names: Iterable[str], paths: Sequence[str | Path]) -> list[str]:
    """One line for each tensor that an adapter replaces or adds to, in order."""
    adapters = [open_adapter(Path(path)) for path in paths]
    lines = []
    for name in names:
        for adapter in adapters:
            if name in adapter.full:
                lines.append(f"{name}: replaced by {adapter.path}")
            if name in adapter.factors:
                lines.append(f"{name}: B @ A * {adapter.scale:g} added from {adapter.path}")
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
    expected = {name: (rows, *s[1:]) if name in _VOCABULARY else s for name, s in base.shapes.items()}
    for name, key in adapter.full.items():
        if adapter.file.shapes[key] != expected[name]:
            raise ValueError(
                f"{where}: {name} is {adapter.file.shapes[key]}, expected {expected[name]}; "
                f"is this the adapter for a model of this size?"
            )
    for name, (a, b) in adapter.factors.items():
        (r, into), (out, r_b) = adapter.file.shapes[a], adapter.file.shapes[b]
        shape = (into, out) if adapter.transpose else (out, into)
        if r != r_b or shape != expected[name]:
            raise ValueError(
                f"{where}: lora_B @ lora_A of {name} is ({out}, {r_b}) @ ({r}, {into}), the model has {expected[name]}; "
                f"is this the adapter for a model of this size?"
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
    if rows != base.config.vocab_size and last is not None and not _fits(size := tokens.count(last), rows):
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


def write_adapter(
    out: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    r: int,
    lora_alpha: float,
    target_modules: Sequence[str],
    base_model: str = "",
    lora_dropout: float = 0.0,
    weights: str = "safetensors",
    tokenizer: Path | None = None,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Write a PEFT adapter folder.

    tensors: {`model.layers.0.self_attn.q_proj.lora_A.weight`, ... or the canonical name of a full tensor: tensor}.
    weights: `safetensors` or `bin`. fields: more for adapter_config.json.
    """
    if weights not in ("safetensors", "bin"):
        raise ValueError(f"weights {weights!r} are not one of safetensors, bin")
    saved = {f"base_model.model.{name}": own(tensor) for name, tensor in tensors.items()}
    full = sorted({name.split(".")[-2] for name in tensors if ".lora_" not in name})
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "modules_to_save": full or None,
        "peft_type": "LORA",
        "r": r,
        "target_modules": list(target_modules),
        "task_type": "CAUSAL_LM",
        **(fields or {}),
    }
    with atomic_folder(out) as folder:
        if weights == "safetensors":
            specs = {key: (tuple(t.shape), t.dtype) for key, t in saved.items()}
            write_safetensors(folder / "adapter_model.safetensors", specs, saved.items())
        else:
            torch.save(saved, folder / "adapter_model.bin")
        write_json(folder / CONFIG, config)
        tokens.copy(tokenizer, folder)
