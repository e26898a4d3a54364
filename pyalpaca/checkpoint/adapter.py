"""A LoRA adapter as PEFT writes it: its config and the keys of its file understood, and the folder written.

What PEFT can train and this can't apply (DoRA, adapters that changed their base while training, ...) is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyalpaca.checkpoint import tokens
from pyalpaca.checkpoint.container.safetensors_file import safetensors_layout
from pyalpaca.checkpoint.container.tensor_file import TensorFile, dtype_name, read_json
from pyalpaca.checkpoint.container.torch_file import open_tensors
from pyalpaca.checkpoint.container.torch_layout import torch_layout
from pyalpaca.checkpoint.mixing import refuse_mixing
from pyalpaca.checkpoint.plan import write_file
from pyalpaca.checkpoint.tokens import write_json
from pyalpaca.files import atomic_folder, require_space

CONFIG = "adapter_config.json"
_FILES = {"safetensors": "adapter_model.safetensors", "bin": "adapter_model.bin"}
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
# Each changes what a merge has to compute; all are off by default, and absent from old configs.
_UNKNOWN = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "alora_invocation_tokens"),
    *("trainable_token_indices", "target_parameters", "kasa_config", "monteclora_config", "arrow_config", "enable_lora"),
)
# These take something out of the base before training, so the adapter fits that base only.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Factors:
    """The two factors beside one weight: their keys in the file, alpha / r, and whether B A is the weight's transpose."""

    a: str
    b: str
    scale: float
    transpose: bool


@dataclass(frozen=True)
class Adapter:
    """One adapter, opened: which canonical tensors it replaces (`full`, by which key of its file) and which it adds to.

    targets, whole: what the config says of either, to see that the file is complete.
    """

    path: Path
    file: TensorFile
    full: Mapping[str, str]
    factors: Mapping[str, Factors]
    targets: tuple[str, ...]
    whole: tuple[str, ...]
    tokenizer: Path | None

    def full_shape(self, name: str) -> tuple[int, ...] | None:
        return self.file.shapes[self.full[name]] if name in self.full else None


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (path / CONFIG).is_file() or any((path / name).is_file() for name in _FILES.values())


def open_adapter(path: Path) -> Adapter:
    """Open an adapter folder; ValueError or FileNotFoundError for what is missing, damaged or unknown to the merge."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: not found, expected the folder of a LoRA adapter; check the path")
    if not (path / CONFIG).exists():
        raise FileNotFoundError(f"{path / CONFIG}: not found, so {path.name} is no LoRA adapter; give the folder that PEFT wrote")
    fields = read_json(path / CONFIG)
    _check_config(path / CONFIG, fields)
    name = next((n for n in _FILES.values() if (path / n).is_file()), None)
    if name is None:
        expected = " or ".join(_FILES.values())
        raise FileNotFoundError(f"{path / _FILES['bin']}: not found, expected {expected}; download the adapter's weights")
    file = open_tensors(path / name)
    full, factors = _parse_keys(file, fields)
    targets = () if _selective(fields) else _words(fields.get("target_modules"))
    return Adapter(path, file, full, factors, targets, _words(fields.get("modules_to_save")), tokens.find(path))


def _check_config(path: Path, fields: Mapping[str, Any]) -> None:
    """ValueError for a config that is damaged, or of an adapter that can't be merged by adding B A."""
    for key in ("r", "lora_alpha"):
        if not _is_positive(fields.get(key)):
            raise ValueError(
                f"{path}: {key} is {fields.get(key)!r}, expected a positive number; restore the adapter's own config"
            )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = fields.get(key) or {}
        if not isinstance(patterns, dict) or not all(_is_positive(value) for value in patterns.values()):
            raise ValueError(
                f"{path}: {key} is {patterns!r}, expected positive numbers by module; restore the adapter's own config"
            )
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{path}: {key} names {pattern!r}, which is no pattern ({error}); correct it") from None
    kind = fields.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {kind!r}, expected LORA; merge this adapter with peft")
    for key in _UNKNOWN:
        if fields.get(key):
            raise ValueError(f"{path}: {key} is {fields[key]!r}, which this merge does not know; merge this adapter with peft")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{path}: init_lora_weights is {start!r}, so the adapter fits a changed base only; "
            f"have peft save it with path_initial_model_for_weight_conversion"
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _words(value: Any) -> tuple[str, ...]:
    """The entries of a list of module names; a single pattern (`all-linear`, a regular expression) says nothing here."""
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list) else ()


def _selective(fields: Mapping[str, Any]) -> bool:
    """Whether a config leaves out some of the layers that its target_modules name."""
    return any(fields.get(key) not in (None, [], "") for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))


def canonical_key(key: str) -> str:
    """A key of an adapter file without PEFT's decorations: `base_model.model.`, `modules_to_save.`, `default.`, ..."""
    for prefix in ("base_model.model.", "base_model."):
        if key.startswith(prefix):
            key = key.removeprefix(prefix)
            break
    return re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)", "", key)


def _parse_keys(file: TensorFile, fields: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Factors]]:
    """({canonical name: key of the full tensor}, {canonical name: its factors})."""
    full: dict[str, str] = {}
    halves: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    for key in file.shapes:
        name = canonical_key(key)
        if name.endswith("rotary_emb.inv_freq") or ".original_module." in name:
            continue  # buffers, and the copy of the base that old PEFT kept beside a saved module
        match = _FACTOR.fullmatch(name)
        weight = f"{match[1]}.weight" if match else name
        group = halves.setdefault(weight, {}) if match else full
        place = match[3] if match else name
        if match and match[2]:
            embeddings.add(weight)
        if place in group:
            raise ValueError(f"{file.path}: {key} and {group[place]} are the same tensor; remove one of them")
        if not file.dtypes[key].is_floating_point:
            raise ValueError(f"{file.path}: {key} is {dtype_name(file.dtypes[key])}, expected floating-point numbers")
        group[place] = key
    factors = {}
    for weight, pair in halves.items():
        if len(pair) < 2:
            half = next(iter(pair))
            raise ValueError(f"{file.path}: {weight} has lora_{half} alone, expected lora_A and lora_B; download it again")
        transpose = weight in embeddings or bool(fields.get("fan_in_fan_out"))
        factors[weight] = _factors(file, fields, weight, pair, transpose)
    return full, factors


def _factors(file: TensorFile, fields: Mapping[str, Any], name: str, pair: Mapping[str, str], transpose: bool) -> Factors:
    module = name.removesuffix(".weight")
    r, said = _setting(fields, "rank_pattern", "r", module)
    alpha, _ = _setting(fields, "alpha_pattern", "lora_alpha", module)
    for key in pair.values():
        if len(file.shapes[key]) != 2:
            raise ValueError(f"{file.path}: {key} is {file.shapes[key]}, expected a matrix; the adapter was not saved whole")
    rank = file.shapes[pair["A"]][0]
    if rank != r:
        raise ValueError(
            f"{file.path}: {name} has rank {rank}, but {CONFIG} says {said} = {r:g}; restore the adapter's own config"
        )
    return Factors(pair["A"], pair["B"], alpha / (r**0.5 if fields.get("use_rslora") else r), transpose)


def _setting(fields: Mapping[str, Any], patterns: str, default: str, module: str) -> tuple[float, str]:
    """(value, what says it) of the rank or alpha of a module: the first pattern wins that matches its name or an end of it."""
    for pattern, value in (fields.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value, f"{patterns} {pattern}"
    return fields[default], default


def check_output(out: str | Path, weights: str) -> None:
    """ValueError if an adapter can't be written to `out`: it is a file, or holds a model, or an adapter of the other kind."""
    if weights not in _FILES:
        raise ValueError(f"weights {weights!r} are not one of {', '.join(_FILES)}")
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file, expected a folder or nothing; choose another output folder")
    refuse_mixing(path, (CONFIG, _FILES[weights]))


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
    weights: `safetensors` or `bin`. fields: more for adapter_config.json. ValueError before anything is written.
    """
    check_output(out, weights)
    saved = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    full = sorted({_module_to_save(name) for name in tensors if ".lora_" not in name})
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
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {key: (tuple(t.shape), t.dtype) for key, t in saved.items()}
    layout = (safetensors_layout if weights == "safetensors" else torch_layout)(_FILES[weights], specs)
    require_space(out, layout.size)
    with atomic_folder(out) as folder:
        write_file(layout, folder / layout.name, saved)
        write_json(folder / CONFIG, config)
        tokens.copy(tokenizer, folder)


def _module_to_save(name: str) -> str:
    """How modules_to_save names a full tensor's module: PEFT compares ends of names, and all of a layer's norms end in `norm`."""
    module = name.removesuffix(".weight")
    return module if module == "model.norm" else module.rpartition(".")[2]
