"""The one sharding table: every parameter's place in the tree, Hugging Face name, shape, and how tensor parallelism cuts it.

Initialisation, reading slices of a checkpoint, every converter, the gradient norm and the optimizer all read this table.
No torch here: the table is about names and numbers only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyalpaca.model.config import LlamaConfig

_LORA_SUFFIX = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model.

    path: its place in the tree, `layers.3.attention.q.weight`.
    name: its Hugging Face name (for LoRA: PEFT's, without `base_model.model.`).
    shape: of the whole tensor.
    dim: the dimension that tensor parallelism cuts; None: every rank holds all of it.
    unit: rows of `dim` that stay together (head_dim for q, k, v, o; else 1); a cut between them would split a head.
    uneven: the vocabulary: its size need not divide, the last rank takes the remainder.
    partial_grad: replicated, but each rank's gradient is only a summand (LoRA factors beside a cut one).
    """

    path: str
    name: str
    shape: tuple[int, ...]
    dim: int | None
    unit: int = 1
    uneven: bool = False
    partial_grad: bool = False

    @property
    def layer(self) -> int | None:
        """The layer this belongs to, or None for embedding, final norm and head."""
        return int(self.path.split(".")[1]) if self.path.startswith("layers.") else None


def parameters(config: LlamaConfig) -> list[Parameter]:
    """Every parameter of the whole model, in Hugging Face's order (a tied head is not listed)."""
    D, F, V, d = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    table = [Parameter("embed", "model.embed_tokens.weight", (V, D), 0, uneven=True)]
    for i in range(config.num_layers):
        tree, hf = f"layers.{i}", f"model.layers.{i}"
        table += [
            Parameter(f"{tree}.attention.q.weight", f"{hf}.self_attn.q_proj.weight", (q, D), 0, unit=d),
            Parameter(f"{tree}.attention.k.weight", f"{hf}.self_attn.k_proj.weight", (kv, D), 0, unit=d),
            Parameter(f"{tree}.attention.v.weight", f"{hf}.self_attn.v_proj.weight", (kv, D), 0, unit=d),
            Parameter(f"{tree}.attention.o.weight", f"{hf}.self_attn.o_proj.weight", (D, q), 1, unit=d),
            Parameter(f"{tree}.ffn.gate.weight", f"{hf}.mlp.gate_proj.weight", (F, D), 0),
            Parameter(f"{tree}.ffn.up.weight", f"{hf}.mlp.up_proj.weight", (F, D), 0),
            Parameter(f"{tree}.ffn.down.weight", f"{hf}.mlp.down_proj.weight", (D, F), 1),
            Parameter(f"{tree}.attention_norm", f"{hf}.input_layernorm.weight", (D,), None),
            Parameter(f"{tree}.ffn_norm", f"{hf}.post_attention_layernorm.weight", (D,), None),
        ]
    table.append(Parameter("norm", "model.norm.weight", (D,), None))
    if not config.tie_embeddings:
        table.append(Parameter("head", "lm_head.weight", (V, D), 0, uneven=True))
    return table


def lora_parameters(base: Iterable[Parameter], rank: int, targets: Iterable[str]) -> list[Parameter]:
    """The LoRA factors beside those projections of `base` whose last HF module name is in `targets` (`q_proj`, ...).

    A is (rank, in), B is (out, rank). The factor on the cut side is cut like the weight, the other one is whole on every
    rank and its gradient is a sum over ranks. ValueError if a target matches nothing.
    """
    wanted, table, seen = set(targets), [], set()
    for p in base:
        module = p.name.split(".")[-2]
        if module not in wanted or not p.path.endswith(".weight"):
            continue
        seen.add(module)
        stem, hf = p.path.removesuffix(".weight"), p.name.removesuffix(".weight")
        out, into = p.shape
        table += [
            Parameter(
                f"{stem}.lora_a",
                f"{hf}.{_LORA_SUFFIX['lora_a']}",
                (rank, into),
                1 if p.dim == 1 else None,
                p.unit,
                partial_grad=p.dim == 0,
            ),
            Parameter(
                f"{stem}.lora_b",
                f"{hf}.{_LORA_SUFFIX['lora_b']}",
                (out, rank),
                0 if p.dim == 0 else None,
                p.unit,
                partial_grad=p.dim == 1,
            ),
        ]
    if wanted - seen:
        have = sorted({p.name.split(".")[-2] for p in base if p.path.endswith(".weight")})
        raise ValueError(f"LoRA target {', '.join(sorted(wanted - seen))} matches no projection; there are {', '.join(have)}")
    return table


def cut(size: int, rank: int, ranks: int, unit: int = 1, uneven: bool = False) -> tuple[int, int]:
    """[start, stop) of `rank`'s share of a dimension. Shares are equal; with `uneven` the last one also takes the remainder."""
    if not uneven and size % (unit * ranks):
        what = f"{size // unit} heads" if unit > 1 else f"a dimension of {size}"
        raise ValueError(f"{what} can't be cut in {ranks} equal parts; choose a tensor-parallel size that divides it")
    share = size // ranks
    return rank * share, size if rank == ranks - 1 else (rank + 1) * share


def shard(parameter: Parameter, rank: int, ranks: int) -> tuple[int, int, int] | None:
    """(dim, start, stop) of the piece that a tensor-parallel rank holds; None if it holds the whole tensor."""
    if parameter.dim is None or ranks == 1:
        return None
    try:
        start, stop = cut(parameter.shape[parameter.dim], rank, ranks, parameter.unit, parameter.uneven)
    except ValueError as error:
        raise ValueError(f"{parameter.name}: {error}") from None
    return parameter.dim, start, stop


def stage_layers(num_layers: int, stage: int, stages: int, counts: Sequence[int] = ()) -> range:
    """The layers of a pipeline stage: contiguous; as many as `counts` says of each stage, else as even as possible.

    ValueError if a stage has none, or `counts` does not fit.
    """
    if counts:
        if len(counts) != stages or sum(counts) != num_layers or min(counts) < 1:
            raise ValueError(
                f"layers per stage {','.join(map(str, counts))} are {sum(counts)} on {len(counts)} stages, "
                f"expected {num_layers} on {stages}, at least 1 each"
            )
        return range(sum(counts[:stage]), sum(counts[: stage + 1]))
    if num_layers < stages:
        raise ValueError(
            f"{num_layers} layers can't fill {stages} pipeline stages; choose a pipeline-parallel size of at most {num_layers}"
        )
    return range(stage * num_layers // stages, (stage + 1) * num_layers // stages)


def stage_parameters(
    table: Iterable[Parameter], num_layers: int, stage: int, stages: int, counts: Sequence[int] = ()
) -> list[Parameter]:
    """The parameters that a pipeline stage holds: its layers; the first also the embedding, the last also final norm and head.

    counts: see `stage_layers`.
    """
    layers = stage_layers(num_layers, stage, stages, counts)
    ends = {"embed": stage == 0, "norm": stage == stages - 1, "head": stage == stages - 1}
    return [p for p in table if (ends[p.path] if p.layer is None else p.layer in layers)]


def chunk_parameters(
    table: Iterable[Parameter], num_layers: int, stage: int, stages: int, chunks: int, counts: Sequence[int] = ()
) -> list[list[Parameter]]:
    """The parameters of each chunk of an interleaved stage: chunk c is stage c * stages + stage of stages * chunks.

    counts: see `stage_layers`, of the stages * chunks virtual stages.
    """
    whole = list(table)
    return [stage_parameters(whole, num_layers, c * stages + stage, stages * chunks, counts) for c in range(chunks)]


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that counts: layer 2 comes before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
