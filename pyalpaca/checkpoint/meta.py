"""Meta's layout: consolidated.NN.pth, params.json, tokenizer.model.

A tensor is the concatenation over shards. Meta's rotary embedding turns neighbouring pairs, Hugging Face's the two halves
of a head, so the rows of q and k are permuted within each head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyalpaca.checkpoint import tokens
from pyalpaca.checkpoint.canonical import Reader, check_shapes, join, joined_shape, parse_config
from pyalpaca.checkpoint.container.tensor_file import Piece, Spec, TensorFile, read_json
from pyalpaca.checkpoint.container.torch_file import open_tensors
from pyalpaca.checkpoint.container.torch_layout import DEFAULT_CONTAINER, torch_layout
from pyalpaca.checkpoint.plan import Checksums, Made, Plan, Step, execute
from pyalpaca.checkpoint.sizes import size_of
from pyalpaca.model import LlamaConfig, config_from_meta, config_to_meta, cut, natural_key, parameters, whole_slice

SHARDS = re.compile(r"consolidated\.(\d+)\.pth")
_ENDS = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", 1),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
}
_BY_ROWS = ("tok_embeddings.weight", 0)
"""How LLaMA 3's embedding is cut."""
_LAYER = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}


def meta_name(name: str) -> tuple[str, int | None]:
    """Meta's name of a canonical tensor and the dimension that shards cut; None: every shard holds all of it."""
    if name in _ENDS:
        return _ENDS[name]
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    ours, dim = _LAYER[module]
    return f"layers.{layer}.{ours}.weight", dim


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, whole heads (n d, D), from Hugging Face's order (two halves) to Meta's (pairs)."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def deinterleave(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleave`."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def is_meta(path: Path) -> bool:
    """Whether a folder holds Meta's shards, or should: it has a params.json and no config.json (Mistral's have both)."""
    params_only = (path / "params.json").is_file() and not (path / "config.json").is_file()
    return params_only or any(SHARDS.fullmatch(f.name) for f in path.iterdir())


def open_meta(path: Path) -> Reader:
    """Open a folder in Meta's layout.

    Raises ValueError or FileNotFoundError for a missing, truncated or foreign shard, too few of them, or an unknown tensor.
    """
    fields = read_json(path / "params.json")
    names = sorted((f.name for f in path.iterdir() if SHARDS.fullmatch(f.name)), key=natural_key)
    if not names:
        raise FileNotFoundError(f"{path / 'consolidated.00.pth'}: not found, but params.json is there; download the shards")
    last = int(SHARDS.fullmatch(names[-1])[1])  # type: ignore[index]
    for i in range(last + 1):
        if f"consolidated.{i:02d}.pth" not in names:
            raise FileNotFoundError(
                f"{path / f'consolidated.{i:02d}.pth'}: not found, but {names[-1]} is there; download the missing shard"
            )
    shards = [open_tensors(path / name) for name in names]
    for key in ("tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight", "output.weight"):
        for shard in shards:
            if len(shard.shapes.get(key, ())) != 2:
                raise ValueError(f"{shard.path}: no matrix {key}; expected a shard of a LLaMA model in Meta's format")
    rows = sum(s.shapes["output.weight"][0] for s in shards)
    width = sum(s.shapes["layers.0.feed_forward.w1.weight"][0] for s in shards)
    config = parse_config(
        path / "params.json", lambda: config_from_meta(fields, vocab_size=rows, intermediate_size=width), len(shards[0].shapes)
    )
    _check_count(path, config, shards)
    dims = {p.name: meta_name(p.name) for p in parameters(config)}
    if shards[0].shapes["tok_embeddings.weight"][1] == config.hidden_size and len(shards) > 1:
        dims["model.embed_tokens.weight"] = _BY_ROWS
    _check_keys(shards, {meta for meta, _ in dims.values()} | ({"output.weight"} if config.tie_embeddings else set()))
    found = {
        name: joined_shape(path, meta, [(s.shapes[meta], s.dtypes[meta]) for s in shards], dim)
        for name, (meta, dim) in dims.items()
    }
    shapes = check_shapes(path, config, found, f"the {len(shards)} shards and params.json must be of the same model")
    _check_replicas(shards, [meta for meta, dim in dims.values() if dim is None])
    if config.tie_embeddings:
        _check_tied(shards, by_rows=dims["model.embed_tokens.weight"] == _BY_ROWS)

    def fetch(name: str, piece: Piece | None) -> Tensor:
        meta, dim = dims[name]
        if dim is None:
            return shards[0].read(meta, piece)
        parts = [(s.shapes[meta][dim], lambda cut, s=s: s.read(meta, cut)) for s in shards]
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return join(dim, parts, piece)
        d = config.head_dim
        if piece is None or piece[0] == 1:
            return deinterleave(join(0, parts, piece), d)
        first, end = piece[1] // d * d, -(-piece[2] // d) * d  # the permutation stays within a head
        return deinterleave(join(0, parts, (0, first, end)), d)[piece[1] - first : piece[2] - first]

    dtypes = {name: shards[0].dtypes[meta] for name, (meta, _) in dims.items()}
    return Reader("meta", path, config, shapes, dtypes, fetch, tokens.find(path, path.parent))


def _check_count(path: Path, config: LlamaConfig, shards: list[TensorFile]) -> None:
    """ValueError if the rows of q in all shards are not the model's: the most telling sign of a missing shard."""
    rows = [s.shapes["layers.0.attention.wq.weight"][0] for s in shards]
    expected = config.num_heads * config.head_dim
    if sum(rows) != expected:
        needed = f", {expected // rows[0]} shards" if rows[0] and expected % rows[0] == 0 else ""
        raise ValueError(
            f"{path}: {len(shards)} shard{'s' * (len(shards) > 1)} with {sum(rows)} rows of attention.wq found, params.json "
            f"expects {expected} rows{needed}; download the missing shards"
        )


def _check_keys(shards: list[TensorFile], expected: set[str]) -> None:
    for shard in shards:
        keys = {key for key in shard.shapes if not key.endswith(("rope.freqs", "inv_freq"))}
        if missing := sorted(expected - keys, key=natural_key):
            raise ValueError(
                f"{shard.path}: {missing[0]} missing; expected the tensors of params.json's model, download it again"
            )
        if extra := sorted(keys - expected, key=natural_key):
            raise ValueError(
                f"{shard.path}: {extra[0]} is in no LLaMA model of params.json's shape; is it another model's shard?"
            )


def _check_replicas(shards: list[TensorFile], names: list[str]) -> None:
    """Norms are in every shard: where they differ, shards of two models have been mixed."""
    for shard in shards[1:]:
        for name in names:
            if not torch.equal(shard.read(name, None), shards[0].read(name, None)):
                raise ValueError(
                    f"{shard.path}: {name} differs from that in {shards[0].path.name}; the shards are of different models"
                )


def _check_tied(shards: list[TensorFile], by_rows: bool) -> None:
    """params.json says that head and embedding are one tensor, but files of this layout hold both."""
    head = torch.cat([s.read("output.weight", None) for s in shards])
    embed = torch.cat([s.read("tok_embeddings.weight", None) for s in shards], 0 if by_rows else 1)
    if not torch.equal(head, embed):
        raise ValueError(
            f"{shards[0].path}: output.weight is not tok_embeddings.weight, but params.json says that they are tied; "
            f"set tie_word_embeddings to false"
        )


def params_json(config: LlamaConfig) -> dict[str, Any]:
    """The fields of params.json, in the order and with the values that the original merge writes.

    Only LLaMA 1 has a table entry: its epsilon is the table's; LLaMA 2's same shapes (4096 positions) keep their own.
    ValueError for a model that params.json can't describe.
    """
    size = size_of(config) if config.max_positions == 2048 else None
    return config_to_meta(config, size[1].norm_eps if size else None)


def plan_meta(
    reader: Reader, *, num_shards: int | None = None, container: str = DEFAULT_CONTAINER, order: Sequence[str] = ()
) -> Plan:
    """Meta's layout: shards, params.json and tokenizer files.

    num_shards: by default as many as Meta published that size in, 1 for other shapes. container: which torch.save's layout
    the shards follow. order: canonical names in the order in which the shards hold them, if not Hugging Face's.
    Raises ValueError for a model that this layout can't express or can't cut so.
    """
    config = reader.config
    size = size_of(config)
    n = num_shards if num_shards is not None else size[1].num_shards if size else 1
    if n < 1:
        raise ValueError(f"a model can't be written in {n} shards; choose at least 1")
    try:
        fields = params_json(config)
    except ValueError as error:
        raise ValueError(f"{reader.path}: {error}") from None
    heads = config.num_heads, config.num_kv_heads
    for what, total in (("heads", heads[0]), ("key/value heads", heads[1]), ("feed-forward rows", config.intermediate_size)):
        if total % n:
            raise ValueError(f"{reader.path}: {total} {what} can't be cut into {n} shards; choose a number that divides them")
    table = {name: meta_name(name) for name in order or reader.names}
    if fields["vocab_size"] != -1:
        table["model.embed_tokens.weight"] = _BY_ROWS
    if config.tie_embeddings:
        table["lm_head.weight"] = meta_name("lm_head.weight")
    source = {name: name if name in reader.shapes else "model.embed_tokens.weight" for name in table}  # of a tied head
    files = [f"consolidated.{i:02d}.pth" for i in range(n)]

    def piece(name: str, shard: int) -> Piece | None:
        dim = table[name][1]
        return None if dim is None else (dim, *cut(reader.shapes[source[name]][dim], shard, n, uneven=True))

    def spec(name: str, shard: int) -> Spec:
        shape, where = list(reader.shapes[source[name]]), piece(name, shard)
        if where is not None:
            shape[where[0]] = where[2] - where[1]
        return tuple(shape), reader.dtypes[source[name]]

    def make(names: Sequence[str], read: Mapping[str, Tensor]) -> Iterator[Made]:
        for name in names:
            whole = read[source[name]]
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                whole = interleave(whole, config.head_dim)
            for i, file in enumerate(files):
                yield file, table[name][0], whole_slice(whole, piece(name, i))

    def finish(folder: Path, checksums: Checksums) -> None:
        with (folder / "params.json").open("w") as file:
            json.dump(fields, file)
        tokens.copy(reader.tokenizer, folder)

    layouts = [torch_layout(file, {table[name][0]: spec(name, i) for name in table}, container) for i, file in enumerate(files)]
    steps = []
    for name in reader.names:
        made = [other for other in table if source[other] == name]
        steps.append(Step((name,), partial(make, made)))
    return Plan("meta", reader, layouts, steps, ("params.json", *tokens.present(reader.tokenizer)), finish)


def write_meta(reader: Reader, out: str | Path, **how: Any) -> None:
    """Write Meta's layout; `how` is `plan_meta`'s."""
    execute(plan_meta(reader, **how), out)
