"""llama.cpp's layout: a LLaMA model in one GGUF file, its config as metadata, its tokenizer inside.

As in Meta's, the rows of q and k are permuted. Norms are always float32 there: beside float16 or bfloat16 matrices, norms
that lose nothing in that type are read in it, so the same weights have the same digest as elsewhere. Quantized tensors are
read as float32, exactly what they stand for. Source: convert_hf_to_gguf.py of llama.cpp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyalpaca.checkpoint.canonical import Reader, check_shapes, parse_config
from pyalpaca.checkpoint.container.gguf_file import GgufFile, Value, gguf_layout, open_gguf_files
from pyalpaca.checkpoint.container.gguf_types import PLAIN, block_size, encode
from pyalpaca.checkpoint.container.tensor_file import Piece, dtype_name
from pyalpaca.checkpoint.gguf_config import ROPE_FACTORS, config_from_gguf, config_metadata, llama3_factors
from pyalpaca.checkpoint.gguf_token_files import has_tokenizer, special_ids
from pyalpaca.checkpoint.gguf_tokens import tokenizer_metadata
from pyalpaca.checkpoint.meta import deinterleave, interleave
from pyalpaca.checkpoint.plan import Made, Plan, Step, execute
from pyalpaca.model import config_to_hf, natural_key, parameters

_ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_PERMUTED = ("q_proj.weight", "k_proj.weight")

GGUF_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}
"""The types in which a model can be written, with their number in `general.file_type`."""


def gguf_name(name: str) -> str:
    """llama.cpp's name of a canonical tensor."""
    if name in _ENDS:
        return _ENDS[name]
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_LAYER[module]}.weight"


def find_gguf(path: Path) -> Path | None:
    """The file that holds a model's beginning: `path` itself, or the only model in a folder; None if there is none.

    ValueError if a folder holds several.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = sorted(f for f in path.glob("*.gguf") if not f.name.startswith("mmproj"))
    models = [f for f in files if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", f.name)] or files[:1]
    if len(models) > 1:
        raise ValueError(f"{path}: holds several models, {models[0].name} and {models[1].name}; give the one to open")
    return models[0] if models else None


def open_gguf(path: Path) -> Reader:
    """Open a LLaMA model in a GGUF file (or split in several, of which `path` is one), lazily.

    ValueError or FileNotFoundError for a damaged file, another architecture, and tensors that no plain LLaMA has.
    """
    file = open_gguf_files(path)
    config = parse_config(path, lambda: config_from_gguf(file), len(file.types))
    names = {p.name: gguf_name(p.name) for p in parameters(config)}
    extra = file.types.keys() - names.values() - {ROPE_FACTORS}
    if extra:
        raise ValueError(
            f"{path}: {min(extra, key=natural_key)} is in no LLaMA model of {config.num_layers} layers; models with biases, "
            "fused matrices or several experts can't be read"
        )
    found = {name: file.tensors.shapes[key] for name, key in names.items() if key in file.types}
    shapes = check_shapes(path, config, found, "the tensors and the metadata must be of the same LLaMA model")
    integer = next((key for key in names.values() if not file.tensors.dtypes[key].is_floating_point), None)
    if integer is not None:
        raise ValueError(f"{path}: {integer} is {file.types[integer]}, expected floating-point numbers; take another file")
    norms = _norm_dtype(file, names.values())
    dtypes = {name: norms if len(shapes[name]) == 1 else file.tensors.dtypes[key] for name, key in names.items()}

    def fetch(name: str, piece: Piece | None) -> Tensor:
        key, d = names[name], config.head_dim
        if not name.endswith(_PERMUTED):
            return file.tensors.read(key, piece).to(dtypes[name])
        if piece is None or piece[0] == 1:
            return deinterleave(file.tensors.read(key, piece), d)
        first, end = piece[1] // d * d, -(-piece[2] // d) * d  # the permutation stays within a head
        return deinterleave(file.tensors.read(key, (0, first, end)), d)[piece[1] - first : piece[2] - first]

    fields = config_to_hf(config, dtype_name(dtypes[next(iter(names))]))
    fields |= {f"{role}_token_id": i for role, i in special_ids(file.metadata).items() if role != "unk"}
    tokenizer = path if has_tokenizer(file.metadata) else None
    return Reader("gguf", path, config, shapes, dtypes, fetch, tokenizer, fields)


def _norm_dtype(file: GgufFile, keys: Collection[str]) -> torch.dtype:
    """The type of the matrices, if they are all of one and all norms keep their values in it; else float32."""
    matrices = {file.types[key] for key in keys if len(file.tensors.shapes[key]) == 2}
    if matrices not in ({"F16"}, {"BF16"}):
        return torch.float32
    dtype = PLAIN[matrices.pop()]
    norms = [file.tensors.read(key, None).float() for key in keys if len(file.tensors.shapes[key]) == 1]
    return dtype if all(torch.equal(norm.to(dtype).float(), norm) for norm in norms) else torch.float32


def plan_gguf(reader: Reader, *, dtype: str | None = None, name: str = "model.gguf") -> Plan:
    """One GGUF file with all that llama.cpp needs.

    dtype: one of GGUF_TYPES; None: each matrix as it is, without loss. Norms are float32 in any case. A matrix whose rows are
    no whole number of quantization blocks is float16; the head of a q4_0 model is q8_0, since its errors are felt most.
    Raises ValueError for a model, a type or a tokenizer that can't be written so.
    """
    if dtype is not None and dtype not in GGUF_TYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(GGUF_TYPES)}")
    config = reader.config
    kinds = {p.name: _kind(reader, p.name, dtype) for p in parameters(config)}
    tensors = {gguf_name(key): (reader.shapes[key], kind) for key, kind in kinds.items()}

    def stored(tensor: Tensor, key: str) -> Made:
        rows = interleave(tensor, config.head_dim) if key.endswith(_PERMUTED) else tensor
        return name, gguf_name(key), encode(rows, kinds[key])

    steps = [Step((key,), lambda read, key=key: [stored(read[key], key)]) for key in kinds]  # type: ignore[misc]
    scaling = config.rope_scaling
    if scaling is not None and scaling.get("rope_type", scaling.get("type")) == "llama3":
        factors = llama3_factors(scaling, config.head_dim, config.rope_theta)
        tensors = {ROPE_FACTORS: (tuple(factors.shape), "F32"), **tensors}
        steps.insert(0, Step((), lambda read: [(name, ROPE_FACTORS, factors)]))
    kind = dtype or kinds["model.layers.0.self_attn.q_proj.weight"].lower()
    return Plan("gguf", reader, [gguf_layout(name, _metadata(reader, kind), tensors)], steps, single=True)


def _kind(reader: Reader, name: str, dtype: str | None) -> str:
    """ggml's type in which a tensor is stored."""
    shape = reader.shapes[name]
    if len(shape) == 1:
        return "F32"
    if dtype is None:
        own = {PLAIN[kind]: kind for kind in ("F32", "F16", "BF16")}
        if reader.dtypes[name] not in own:
            raise ValueError(
                f"{reader.path}: {name} is {dtype_name(reader.dtypes[name])}, which llama.cpp doesn't compute in; "
                f"choose a dtype of {', '.join(GGUF_TYPES)}"
            )
        return own[reader.dtypes[name]]
    head = "model.embed_tokens.weight" if reader.config.tie_embeddings else "lm_head.weight"
    kind = "Q8_0" if dtype == "q4_0" and name == head else dtype.upper()
    return "F16" if shape[-1] % block_size(kind) else kind


def _metadata(reader: Reader, kind: str) -> dict[str, Value]:
    """All keys of a model's file, as llama.cpp's converter writes them."""
    import gguf

    count = sum(math.prod(shape) for shape in reader.shapes.values())
    path = reader.path.resolve()
    return {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": path.stem if path.suffix == ".gguf" else path.name,
        "general.size_label": gguf.size_label(count, count, 0, 0),
        **config_metadata(reader.config),
        "general.file_type": np.uint32(GGUF_TYPES[kind]),
        "general.quantization_version": np.uint32(gguf.GGML_QUANT_VERSION),
        **tokenizer_metadata(reader.tokenizer, reader.config.vocab_size, reader.fields),
    }


def write_gguf(reader: Reader, out: str | Path, **how: Any) -> None:
    """Write a GGUF file; `how` is `plan_gguf`'s."""
    execute(plan_gguf(reader, **how), out)
