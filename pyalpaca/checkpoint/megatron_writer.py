"""Writing Megatron's (AscendSpeed's) model-parallel folders, either spelling, and the variant that DeepSpeed loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyalpaca.checkpoint import tokens
from pyalpaca.checkpoint.canonical import Reader
from pyalpaca.checkpoint.container.tensor_file import Piece, Spec
from pyalpaca.checkpoint.container.torch_layout import DEFAULT_CONTAINER, torch_layout
from pyalpaca.checkpoint.hf import write_config
from pyalpaca.checkpoint.megatron import ENDS, INV_FREQ, LAYER_PREFIX, MODULES, TRACKERS, inverse_frequencies
from pyalpaca.checkpoint.plan import Checksums, Made, Plan, Step, execute
from pyalpaca.model import LlamaConfig, parameters, shard, stage_layers, stage_parameters, whole_slice

PADDINGS = ("copy", "zero")
"""What the rows are that pad the vocabulary: copies of the last real rows, as the original tool has it, or zeros."""


def padded_vocab(vocab_size: int, divisible_by: int, tp: int) -> int:
    """Rows of the embedding over all ranks: the next multiple of `divisible_by` x tp."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple


def check_parallel(config: LlamaConfig, tp: int, pp: int) -> None:
    """ValueError if the model can't be cut so."""
    if tp < 1 or pp < 1:
        raise ValueError(f"tensor-parallel size {tp} and pipeline-parallel size {pp} must be at least 1")
    for what, n in (
        ("heads", config.num_heads),
        ("key/value heads", config.num_kv_heads),
        ("feed-forward rows", config.intermediate_size),
    ):
        if n % tp:
            raise ValueError(f"{n} {what} can't be cut in {tp} equal parts; choose a tensor-parallel size that divides {n}")
    stage_layers(config.num_layers, 0, pp)


def plan_megatron(
    reader: Reader,
    *,
    tp: int = 1,
    pp: int = 1,
    dialect: str = "A",
    deepspeed: bool = False,
    merge_mlp: bool = False,
    divisible_by: int = 128,
    padding: str = "copy",
    container: str = DEFAULT_CONTAINER,
) -> Plan:
    """A model-parallel folder: the ranks' files, and config.json and tokenizer files beside the tracker.

    dialect: `A` (flat keys, AscendSpeed) or `B` (nested, Megatron). The vocabulary is padded to a multiple of divisible_by x tp
    with `padding` rows. A tied head is written as a copy. container: which torch.save's layout the files follow.
    Raises ValueError for a model that can't be cut so, and for DeepSpeed with pipeline stages.
    """
    config = reader.config
    if dialect not in ENDS:
        raise ValueError(f"dialect {dialect!r} is not one of {', '.join(ENDS)}")
    if padding not in PADDINGS:
        raise ValueError(f"vocabulary padding {padding!r} is not one of {', '.join(PADDINGS)}")
    if deepspeed and pp != 1:
        raise ValueError(f"the DeepSpeed variant has no pipeline stages, {pp} asked for; use a pipeline-parallel size of 1")
    if divisible_by < 1:
        raise ValueError(f"the vocabulary can't be divisible by {divisible_by}; 128 is usual")
    try:
        check_parallel(config, tp, pp)
    except ValueError as error:
        raise ValueError(f"{reader.path}: {error}") from None
    padded = padded_vocab(config.vocab_size, divisible_by, tp)
    root = "module" if deepspeed else "model"
    tracker = TRACKERS["deepspeed" if deepspeed else "megatron"]
    table = parameters(config)
    layouts, steps = [], []
    for stage in range(pp):
        files = [_file_name(rank, stage, pp, deepspeed) for rank in range(tp)]
        names = [p.name for p in stage_parameters(table, config.num_layers, stage, pp)]
        if config.tie_embeddings and stage == pp - 1:
            names.append("lm_head.weight")
        tree: dict[str, Any] = {"checkpoint_version": 3.0}
        for part in _parts(reader, names, tp, dialect, merge_mlp, padded, padding == "zero"):
            path = (root, *_path(part.key, dialect))
            _put(tree, path, part.spec)
            steps.append(Step(part.names, _filling(files, "/".join(path), part)))
        if deepspeed:
            tree["dp_world_size"] = 0
        layouts += [torch_layout(file, tree, container) for file in files]

    def finish(folder: Path, checksums: Checksums) -> None:
        (folder / tracker).write_text("release\n")
        write_config(reader, folder)
        tokens.copy(reader.tokenizer, folder)

    small = (tracker, "config.json", "generation_config.json", *tokens.present(reader.tokenizer))
    return Plan("deepspeed" if deepspeed else "megatron", reader, layouts, steps, small, finish)


def write_megatron(reader: Reader, out: str | Path, **how: Any) -> None:
    """Write a model-parallel folder; `how` is `plan_megatron`'s."""
    execute(plan_megatron(reader, **how), out)


def _file_name(rank: int, stage: int, pp: int, deepspeed: bool) -> str:
    if deepspeed:
        return f"release/mp_rank_{rank:02d}_model_states.pt"
    return f"release/mp_rank_{rank:02d}{f'_{stage:03d}' if pp > 1 else ''}/model_optim_rng.pt"


@dataclass(frozen=True)
class Part:
    """One tensor of every rank of a stage: its dotted key, what it is made of, its shape, and how a rank's is made."""

    key: str
    names: tuple[str, ...]
    spec: Spec
    make: Callable[[Mapping[str, Tensor], int], Tensor]


def _parts(
    reader: Reader, names: Sequence[str], tp: int, dialect: str, merge_mlp: bool, padded: int, zero: bool
) -> Iterator[Part]:
    """The tensors of a stage's rank files, in the order in which the original tool writes them."""
    config, modules = reader.config, MODULES[dialect]
    table = {p.name: p for p in parameters(config)}
    first = min(layer for n in names if n in table and (layer := table[n].layer) is not None)

    def take(read: Mapping[str, Tensor], name: str, rank: int) -> Tensor:
        return whole_slice(read[name], shard(table[name], rank, tp))

    def part(key: str, *sources: str, make: Callable[[Sequence[Tensor]], Tensor]) -> Part:
        pieces = [_cut_shape(reader.shapes[name], shard(table[name], 0, tp)) for name in sources]
        shape = (sum(s[0] for s in pieces), *pieces[0][1:])
        return Part(
            key,
            sources,
            (shape, reader.dtypes[sources[0]]),
            lambda read, rank: make([take(read, name, rank) for name in sources]),
        )

    def constant(key: str, tensor: Tensor) -> Part:
        return Part(key, (), (tuple(tensor.shape), tensor.dtype), lambda read, rank: tensor)

    for name in names:
        if name in ENDS[dialect]:
            key = ENDS[dialect][name]
            if name == "model.norm.weight":
                yield part(key, name, make=lambda tensors: tensors[0])
            else:
                yield _vocabulary(reader, key, name, tp, padded, zero)
            continue
        _, _, number, module = name.removesuffix(".weight").split(".", 3)
        prefix, source = f"{LAYER_PREFIX[dialect]}.{int(number) - first}", f"model.layers.{number}"
        if module == "self_attn.q_proj":
            if dialect == "A":
                yield constant(f"{prefix}.{INV_FREQ}", inverse_frequencies(config.head_dim, config.rope_theta))
            qkv = [f"{source}.self_attn.{x}_proj.weight" for x in "qkv"]
            yield part(f"{prefix}.{modules['qkv']}.weight", *qkv, make=partial(fuse, config))
        elif module == "mlp.gate_proj" and merge_mlp:
            yield part(
                f"{prefix}.{modules['merged']}.weight",
                name,
                f"{source}.mlp.up_proj.weight",
                make=lambda tensors: torch.cat(list(tensors)),
            )
        elif module not in ("self_attn.k_proj", "self_attn.v_proj") and not (module == "mlp.up_proj" and merge_mlp):
            yield part(f"{prefix}.{modules[module]}.weight", name, make=lambda tensors: tensors[0])


def _filling(files: Sequence[str], key: str, part: Part) -> Callable[[Mapping[str, Tensor]], Iterator[Made]]:
    return lambda read: ((file, key, part.make(read, rank)) for rank, file in enumerate(files))


def _cut_shape(shape: tuple[int, ...], piece: Piece | None) -> tuple[int, ...]:
    return shape if piece is None else tuple(piece[2] - piece[1] if i == piece[0] else n for i, n in enumerate(shape))


def fuse(config: LlamaConfig, tensors: Sequence[Tensor]) -> Tensor:
    """One rank's q (h d, D), k and v (n d, D) in the fused order: for each key/value head its query heads, its key, its value."""
    q, k, v = tensors
    d, D = config.head_dim, q.shape[1]
    groups = k.shape[0] // d
    return torch.cat([q.view(groups, -1, d, D), k.view(groups, 1, d, D), v.view(groups, 1, d, D)], dim=1).reshape(-1, D)


def _vocabulary(reader: Reader, key: str, name: str, tp: int, padded: int, zero: bool) -> Part:
    """The padded embedding or head; row V + i of the padding is zero or a copy of row V - padding + i."""
    name = name if name in reader.shapes else "model.embed_tokens.weight"  # a tied head
    real, D = reader.shapes[name]
    share = padded // tp
    copied = min(padded - real, real)  # a vocabulary smaller than its padding is repeated

    def make(read: Mapping[str, Tensor], rank: int) -> Tensor:
        whole, start, stop = read[name], rank * share, (rank + 1) * share
        rows = whole[min(start, real) : min(stop, real)]
        if len(rows) == share:
            return rows
        if zero:
            return torch.cat([rows, whole.new_zeros(share - len(rows), D)])
        padding = torch.arange(max(start, real), stop)
        return torch.cat([rows, whole[real - copied + (padding - real) % copied]])

    return Part(key, (name,), ((share, D), reader.dtypes[name]), make)


def _path(key: str, dialect: str) -> tuple[str, ...]:
    """Where a dotted key lies in nested dicts: spelling B nests the model's parts, within the encoder the keys stay dotted."""
    if dialect == "A":
        return (key,)
    part, rest = key.removeprefix("language_model.").split(".", 1)
    return ("language_model", part, *(("word_embeddings", "weight") if part == "embedding" else (rest,)))


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
