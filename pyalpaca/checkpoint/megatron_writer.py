"""Writing Megatron's (AscendSpeed's) model-parallel folders, either spelling, and the variant that DeepSpeed loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyalpaca.checkpoint import tokens
from pyalpaca.checkpoint.canonical import Reader, own
from pyalpaca.checkpoint.hf import write_config
from pyalpaca.checkpoint.megatron import ENDS, INV_FREQ, LAYER_PREFIX, MODULES, TRACKERS, inverse_frequencies
from pyalpaca.checkpoint.mixing import refuse_mixing
from pyalpaca.files import atomic_folder
from pyalpaca.model import LlamaConfig, parameters, shard, stage_layers, stage_parameters


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


def write_megatron(
    reader: Reader,
    out: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    dialect: str = "A",
    deepspeed: bool = False,
    merge_mlp: bool = False,
    divisible_by: int = 128,
) -> None:
    """Write a model-parallel folder, one rank's file in memory at a time, config.json and tokenizer files beside the tracker.

    dialect: `A` (flat keys, AscendSpeed) or `B` (nested, Megatron). The vocabulary is padded to a multiple of divisible_by x tp
    with copies of the last real rows. A tied head is written as a copy. Raises ValueError before anything is written for a
    model that can't be cut so, and for DeepSpeed with pipeline stages.
    """
    config = reader.config
    if dialect not in ENDS:
        raise ValueError(f"dialect {dialect!r} is not one of {', '.join(ENDS)}")
    if deepspeed and pp != 1:
        raise ValueError(f"the DeepSpeed variant has no pipeline stages, {pp} asked for; use a pipeline-parallel size of 1")
    if divisible_by < 1:
        raise ValueError(f"the vocabulary can't be divisible by {divisible_by}; 128 is usual")
    try:
        check_parallel(config, tp, pp)
    except ValueError as error:
        raise ValueError(f"{reader.path}: {error}") from None
    files = {(rank, stage): _file_name(rank, stage, pp, deepspeed) for stage in range(pp) for rank in range(tp)}
    tracker = TRACKERS["deepspeed" if deepspeed else "megatron"]
    refuse_mixing(out, {*files.values(), tracker})
    table = parameters(config)
    bar = tqdm(files.items(), desc="writing", unit="file", disable=None)
    with atomic_folder(out) as folder, bar:
        for (rank, stage), name in bar:
            names = [p.name for p in stage_parameters(table, config.num_layers, stage, pp)]
            if config.tie_embeddings and stage == pp - 1:
                names.append("lm_head.weight")
            flat = rank_tensors(reader, names, rank, tp, dialect, merge_mlp, divisible_by)
            model = flat if dialect == "A" else _nested(flat)
            content: dict[str, Any] = {"checkpoint_version": 3.0, "module" if deepspeed else "model": model}
            if deepspeed:
                content["dp_world_size"] = 0
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, folder / name)
        (folder / tracker).write_text("release\n")
        write_config(reader, folder)
        tokens.copy(reader.tokenizer, folder)


def _file_name(rank: int, stage: int, pp: int, deepspeed: bool) -> str:
    if deepspeed:
        return f"release/mp_rank_{rank:02d}_model_states.pt"
    return f"release/mp_rank_{rank:02d}{f'_{stage:03d}' if pp > 1 else ''}/model_optim_rng.pt"


def rank_tensors(
    reader: Reader, names: list[str], rank: int, tp: int, dialect: str, merge_mlp: bool, divisible_by: int
) -> dict[str, Tensor]:
    """{dotted key: tensor} of one rank, in the order in which the original tool writes them."""
    config, modules = reader.config, MODULES[dialect]
    table = {p.name: p for p in parameters(config)}
    first = min(layer for n in names if n in table and (layer := table[n].layer) is not None)
    state: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        return reader.read(name, shard(table[name], rank, tp))

    for name in names:
        if name in ENDS[dialect]:
            vocabulary = name != "model.norm.weight"
            state[ENDS[dialect][name]] = (
                _vocab_rows(reader, name, rank, tp, divisible_by) if vocabulary else own(reader.read(name))
            )
            continue
        _, _, number, module = name.removesuffix(".weight").split(".", 3)
        prefix, source = f"{LAYER_PREFIX[dialect]}.{int(number) - first}", f"model.layers.{number}"
        if module == "self_attn.q_proj":
            if dialect == "A":
                state[f"{prefix}.{INV_FREQ}"] = inverse_frequencies(config.head_dim, config.rope_theta)
            q, k, v = (read(f"{source}.self_attn.{x}_proj.weight") for x in "qkv")
            state[f"{prefix}.{modules['qkv']}.weight"] = fuse(q, k, v, config)
        elif module == "mlp.gate_proj" and merge_mlp:
            up = read(f"{source}.mlp.up_proj.weight")
            state[f"{prefix}.{modules['merged']}.weight"] = torch.cat([read(name), up])
        elif module not in ("self_attn.k_proj", "self_attn.v_proj") and not (module == "mlp.up_proj" and merge_mlp):
            state[f"{prefix}.{modules[module]}.weight"] = own(read(name))
    return state


def fuse(q: Tensor, k: Tensor, v: Tensor, config: LlamaConfig) -> Tensor:
    """One rank's q (h d, D), k and v (n d, D) in the fused order: for each key/value head its query heads, its key, its value."""
    d, D = config.head_dim, q.shape[1]
    groups = k.shape[0] // d
    return torch.cat([q.view(groups, -1, d, D), k.view(groups, 1, d, D), v.view(groups, 1, d, D)], dim=1).reshape(-1, D)


def _vocab_rows(reader: Reader, name: str, rank: int, tp: int, divisible_by: int) -> Tensor:
    """One rank's rows of the padded embedding or head; row V + i of the padding is a copy of row V - padding + i."""
    name = name if name in reader.shapes else "model.embed_tokens.weight"  # a tied head
    real = reader.shapes[name][0]
    padded = padded_vocab(real, divisible_by, tp)
    start, stop = rank * padded // tp, (rank + 1) * padded // tp
    copied = min(padded - real, real)  # a vocabulary smaller than its padding is repeated
    parts = [reader.read(name, (0, min(start, real), min(stop, real)))]
    row = max(start, real)
    while row < stop:
        source = real - copied + (row - real) % copied
        n = min(stop - row, real - source)
        parts.append(reader.read(name, (0, source, source + n)))
        row += n
    return own(torch.cat(parts))


def _nested(flat: dict[str, Tensor]) -> dict[str, Any]:
    """Spelling B: the parts of the model are dicts, the encoder's keys stay dotted."""
    tree: dict[str, Any] = {}
    for key, tensor in flat.items():
        part, rest = key.removeprefix("language_model.").split(".", 1)
        if part == "embedding":
            tree[part] = {"word_embeddings": {"weight": tensor}}
        else:
            tree.setdefault(part, {})[rest] = tensor
    return {"language_model": tree}
