"""Reading Megatron's (AscendSpeed's) model-parallel folders, both spellings, and the variant that DeepSpeed loads.

On one tensor-parallel rank the fused query_key_value holds, for each of its key/value heads, first the rows of that group's query
heads, then those of its key, then its value (Megatron's own order). With as many key/value heads as heads these are rows
(head, {q, k, v}, head_dim). No rotary permutation: Megatron's halves are Hugging Face's.
The vocabulary is padded; how many rows are real is said by the config.json beside the tracker file, or by the caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyalpaca.checkpoint import tokens
from pyalpaca.checkpoint.canonical import Reader, check_shapes, join, joined_shape, parse_config
from pyalpaca.checkpoint.container.tensor_file import Piece, read_json
from pyalpaca.checkpoint.container.torch_file import open_torch
from pyalpaca.checkpoint.sizes import SIZES
from pyalpaca.model import LlamaConfig, config_from_hf, parameters, whole_slice

TRACKERS = {"megatron": "latest_checkpointed_iteration.txt", "deepspeed": "latest"}
RANK_FILE = re.compile(r"mp_rank_(\d+)(?:_(\d{3}))?/model_optim_rng\.pt|mp_rank_(\d+)_model_states\.pt")
ENDS = {
    "A": {
        "model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.norm.weight": "language_model.final_layernorm.weight",
        "lm_head.weight": "lm_head.lm_head.weight",
    },
    "B": {
        "model.embed_tokens.weight": "language_model.embedding.word_embeddings.weight",
        "model.norm.weight": "language_model.encoder.final_layernorm.weight",
        "lm_head.weight": "language_model.output_layer.weight",
    },
}
LAYER_PREFIX = {"A": "language_model.layers", "B": "language_model.encoder.layers"}
MODULES = {
    "A": {
        "qkv": "attention.query_key_value",
        "self_attn.o_proj": "attention.dense",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.up_proj",
        "mlp.down_proj": "mlp.down_proj",
        "merged": "mlp.proj",
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
    },
    "B": {
        "qkv": "self_attention.query_key_value",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
        "merged": "mlp.proj",
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
    },
}
INV_FREQ = "attention.rotary_emb.inv_freq"


@dataclass(frozen=True)
class Ranks:
    """The opened files of a folder: states[stage][tp rank] is {dotted key: tensor}, layers counted from each stage's first."""

    folder: Path
    layout: str
    dialect: str
    states: list[list[dict[str, Tensor]]]
    layers: list[int]

    @property
    def tp(self) -> int:
        return len(self.states[0])


def find_megatron(path: Path) -> Path | None:
    """The folder with the rank files that a Megatron or DeepSpeed tracker file in `path` names; None without a tracker."""
    for tracker in TRACKERS.values():
        if not (path / tracker).is_file():
            continue
        with (path / tracker).open("rb") as file:
            text = file.read(64).decode(errors="replace").strip()
        name = f"iter_{int(text):07d}" if text.isdigit() and tracker == TRACKERS["megatron"] else text
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{path / tracker}: says {text!r}, expected `release` or an iteration number; correct it")
        if not (path / name).is_dir():
            raise FileNotFoundError(f"{path / name}: not found, but {tracker} names it; correct the file or restore the folder")
        return path / name
    return None


def open_ranks(path: Path) -> Ranks:
    """Open all rank files of a folder; ValueError or FileNotFoundError for a hole in the ranks or a file of another kind."""
    folder = find_megatron(path)
    if folder is None:
        raise FileNotFoundError(f"{path / TRACKERS['megatron']}: not found, expected a Megatron checkpoint folder")
    found: dict[tuple[int, int], Path] = {}
    for file in folder.rglob("*.pt"):
        match = RANK_FILE.fullmatch(file.relative_to(folder).as_posix())
        if match:
            found[int(match[2] or 0), int(match[1] or match[3])] = file
    if not found:
        raise FileNotFoundError(f"{folder}: no mp_rank_NN/model_optim_rng.pt or mp_rank_NN_model_states.pt found; check the path")
    pp, tp = (max(key[i] for key in found) + 1 for i in (0, 1))
    example = found[min(found)].relative_to(folder)
    for stage in range(pp):
        for rank in range(tp):
            if (stage, rank) not in found:
                raise FileNotFoundError(
                    f"{folder}: the file of tensor-parallel rank {rank}, stage {stage} is missing; expected {tp} x {pp} files "
                    f"named like {example}, restore it"
                )
    deepspeed = example.name.endswith("_model_states.pt")
    states = [[_state(found[stage, rank], "module" if deepspeed else "model") for rank in range(tp)] for stage in range(pp)]
    first = states[0][0]
    dialect = next((d for d, ends in ENDS.items() if ends["model.embed_tokens.weight"] in first), None)
    if dialect is None:
        raise ValueError(
            f"{found[0, 0]}: no word embeddings under a known name; expected a LLaMA model of AscendSpeed or Megatron"
        )
    layers = []
    for stage in range(pp):
        keys = [set(state) for state in states[stage]]
        if any(other != keys[0] for other in keys):
            raise ValueError(
                f"{folder}: the tensor-parallel ranks of stage {stage} hold different tensors; the files are of different runs"
            )
        pattern = re.compile(re.escape(LAYER_PREFIX[dialect]) + r"\.(\d+)\.")
        numbers = {int(m[1]) for key in keys[0] if (m := pattern.match(key))}
        if numbers != set(range(len(numbers))) or not numbers:
            raise ValueError(f"{found[stage, 0]}: holds the layers {sorted(numbers)}, expected 0, 1, 2, ... of its stage")
        layers.append(len(numbers))
    return Ranks(folder, "deepspeed" if deepspeed else "megatron", dialect, states, layers)


def _state(path: Path, key: str) -> dict[str, Tensor]:
    content = open_torch(path)
    if not isinstance(content.get(key), Mapping):
        raise ValueError(
            f"{path}: has no `{key}`, but {', '.join(map(str, list(content)[:4]))}; expected a model-parallel checkpoint"
        )
    return _dotted(content[key])


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_dotted(value, f"{prefix}{key}."))
        elif isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
    return flat


def open_megatron(path: Path, vocab_size: int | None = None) -> Reader:
    """Open a Megatron or DeepSpeed folder of any tensor and pipeline size, either spelling, merged MLP or not.

    vocab_size: needed where no config.json lies beside the tracker file. Raises ValueError or FileNotFoundError.
    """
    ranks = open_ranks(path)
    fields: dict[str, Any] = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if vocab_size is not None and fields:
        fields["vocab_size"] = vocab_size
    if fields:
        config = parse_config(path / "config.json", lambda: config_from_hf(fields), sum(len(state) for state, *_ in ranks.states))
    else:
        config = _config_from_shapes(path, ranks, vocab_size)
    if sum(ranks.layers) != config.num_layers:
        raise ValueError(f"{ranks.folder}: the stages hold {sum(ranks.layers)} layers, config.json says {config.num_layers}")
    if config.num_kv_heads % ranks.tp:
        raise ValueError(f"{ranks.folder}: {config.num_kv_heads} key/value heads don't divide among {ranks.tp} ranks")
    sources: dict[str, Source] = {}
    for p in parameters(config):
        sources[p.name] = _source(ranks, config, p.name, p.dim)
    found = {name: source.shape for name, source in sources.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in found:
            rows, width = found[name]
            if rows < config.vocab_size:
                raise ValueError(
                    f"{ranks.folder}: {name} has {rows} rows, fewer than the vocabulary, {config.vocab_size}; correct it"
                )
            found[name] = (config.vocab_size, width)  # what follows is padding
    shapes = check_shapes(ranks.folder, config, found, "the rank files and config.json must be of the same model")

    def fetch(name: str, piece: Piece | None) -> Tensor:
        source, shape = sources[name], shapes[name]
        if piece is None and shape != source.shape:
            piece = (0, 0, shape[0])
        elif piece is not None and piece[0] == 1 and shape != source.shape:
            return source.read(piece)[: shape[0]]
        return source.read(piece)

    dtypes = {name: source.dtype for name, source in sources.items()}
    return Reader(ranks.layout, path, config, shapes, dtypes, fetch, tokens.find(path, ranks.folder), fields)


@dataclass(frozen=True)
class Source:
    """Where one canonical tensor comes from: its shape with padding, and how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[Piece | None], Tensor]


def _source(ranks: Ranks, config: LlamaConfig, name: str, dim: int | None) -> Source:
    stage, key, select = _locate(ranks, config, name)
    for rank in ranks.states[stage]:
        if key not in rank:
            raise ValueError(f"{ranks.folder}: {key} of stage {stage} missing; expected the tensors of a LLaMA model")
    held = [rank[key] for rank in ranks.states[stage]]
    if dim is None:
        if any(not torch.equal(other, held[0]) for other in held[1:]):
            raise ValueError(f"{ranks.folder}: {key} of stage {stage} differs between ranks; the files are of different runs")
        return Source(tuple(held[0].shape), held[0].dtype, lambda piece: whole_slice(held[0], piece))
    try:
        views = [select(tensor) for tensor in held]
    except (ValueError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"{ranks.folder}: {key} of stage {stage} does not fit config.json ({error}); is it another model's?"
        ) from None
    shape = joined_shape(ranks.folder, key, [(_flat_shape(view), view.dtype) for view in views], dim)
    lengths = [_flat_shape(view)[dim] for view in views]
    parts = [
        (length, lambda piece, view=view: whole_slice(_flat(view), piece)) for length, view in zip(lengths, views, strict=True)
    ]
    return Source(shape, held[0].dtype, lambda piece: join(dim, parts, piece))


def _locate(ranks: Ranks, config: LlamaConfig, name: str) -> tuple[int, str, Callable[[Tensor], Tensor]]:
    """(stage, key, what of that tensor) of a canonical tensor."""
    ends = ENDS[ranks.dialect]
    if name in ends:
        return (0 if name.startswith("model.embed") else len(ranks.states) - 1), ends[name], lambda tensor: tensor
    _, _, number, module = name.removesuffix(".weight").split(".", 3)
    stage, local = 0, int(number)
    while local >= ranks.layers[stage]:
        local -= ranks.layers[stage]
        stage += 1
    names, prefix = MODULES[ranks.dialect], f"{LAYER_PREFIX[ranks.dialect]}.{local}"
    if module.startswith("self_attn.") and module != "self_attn.o_proj":
        which = module.split(".")[1][0]
        return stage, f"{prefix}.{names['qkv']}.weight", lambda tensor: fused_rows(tensor, config, which)
    merged_key = f"{prefix}.{names['merged']}.weight"
    if module in ("mlp.gate_proj", "mlp.up_proj") and merged_key in ranks.states[stage][0]:
        half = 0 if module == "mlp.gate_proj" else 1
        return stage, merged_key, lambda tensor: tensor.view(2, -1, tensor.shape[1])[half]
    return stage, f"{prefix}.{names[module]}.weight", lambda tensor: tensor


def fused_rows(fused: Tensor, config: LlamaConfig, which: str) -> Tensor:
    """A view (groups, heads, d, D) of the rows of `q`, `k` or `v` in one rank's fused tensor ((groups (q heads + 2) d), D)."""
    q = config.num_heads // config.num_kv_heads
    rows = (q + 2) * config.head_dim
    if fused.shape[0] % rows:
        raise ValueError(f"{fused.shape[0]} rows are no multiple of {rows}")
    grouped = fused.view(-1, q + 2, config.head_dim, fused.shape[1])
    return grouped[:, {"q": slice(0, q), "k": slice(q, q + 1), "v": slice(q + 1, q + 2)}[which]]


def _flat_shape(view: Tensor) -> tuple[int, int]:
    return view.shape[:-1].numel(), view.shape[-1]


def _flat(view: Tensor) -> Tensor:
    return view.reshape(_flat_shape(view))


def _config_from_shapes(path: Path, ranks: Ranks, vocab_size: int | None) -> LlamaConfig:
    """The model's shape without a config.json: from the tensors, inv_freq (spelling A) or a published size."""
    if vocab_size is None:
        raise ValueError(
            f"{path / 'config.json'}: not found, so the real vocabulary is unknown (the files hold a padded one); "
            f"put the model's config.json there or give the vocabulary size (--vocab-size)"
        )
    dialect, tp, first = ranks.dialect, ranks.tp, ranks.states[0][0]
    prefix, names = f"{LAYER_PREFIX[dialect]}.0", MODULES[dialect]
    try:
        hidden, q_local = first[f"{prefix}.{names['self_attn.o_proj']}.weight"].shape
        qkv = first[f"{prefix}.{names['qkv']}.weight"].shape[0] * tp
        ffn = first[f"{prefix}.{names['mlp.down_proj']}.weight"].shape[1] * tp
    except KeyError as error:
        raise ValueError(f"{ranks.folder}: {error.args[0]} missing; expected the tensors of a LLaMA model") from None
    layers, q = sum(ranks.layers), q_local * tp
    inv_freq = first.get(f"{prefix}.{INV_FREQ}")
    size = next((s for s in SIZES.values() if (s.num_layers, s.hidden_size, s.intermediate_size) == (layers, hidden, ffn)), None)
    if size is None and inv_freq is None:
        raise ValueError(
            f"{path / 'config.json'}: not found, and {layers} layers of width {hidden} are no published size, so the number of "
            f"heads is unknown; put the model's config.json there"
        )
    d = 128 if inv_freq is None else 2 * inv_freq.shape[0]
    if inv_freq is not None and not torch.allclose(inv_freq.float(), inverse_frequencies(d, 10000.0), rtol=1e-2):
        raise ValueError(
            f"{path / 'config.json'}: not found, and the rotary frequencies are not LLaMA's; put the model's config.json there"
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=q // d,
        num_kv_heads=(qkv - q) // 2 // d,
        head_dim=d,
        norm_eps=size.norm_eps if size else 1e-6,
    )


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """The buffer `inv_freq` that LLaMA's attention kept, fp32 (d/2,)."""
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
