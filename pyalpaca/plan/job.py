"""What is planned: a model, a layout of devices, a batch, and what of the backward pass is computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pyalpaca.model import LlamaConfig, Parameter, lora_parameters, parameters, shard, stage_layers
from pyalpaca.parallel import Action, pipeline_schedule

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Job:
    """A training to be planned. ValueError for what contradicts itself or can't be cut.

    tp, cp, pp, dp: sizes of the tensor, context, pipeline and data axes.
    micro_batch, global_batch: samples. seq: tokens a sample. layers: of each (virtual) stage, even
    if not given. chunks: virtual stages a stage. zero: 0 and 1 are pyalpaca's own, 2 and 3 DeepSpeed's, which keeps
    two buckets of so many numbers (1e8 as published). lora_r 0: all weights learn.
    """

    model: LlamaConfig
    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    micro_batch: int = 1
    global_batch: int = 1
    seq: int = 2048
    sequence_parallel: bool = False
    dtype: str = "fp16"
    recompute: str = "none"
    recompute_every: int = 1
    zero: int = 0
    bucket: int = 10**8
    lora_r: int = 0
    lora_targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    lora_full: Sequence[str] = ("embed_tokens", "lm_head")
    schedule: str = "1f1b"
    chunks: int = 1
    layers: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("tp", "cp", "pp", "dp", "micro_batch", "global_batch", "seq", "recompute_every", "chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name, choices in (("zero", (0, 1, 2, 3)), ("recompute", RECOMPUTE), ("dtype", tuple(BYTES))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(str, choices))}")
        if self.zero > 1 and self.tp * self.cp * self.pp > 1:
            raise ValueError(f"ZeRO-{self.zero} is DeepSpeed's, which is data-parallel only; set tp, cp, pp to 1, or zero to 1")
        if self.global_batch % (self.dp * self.micro_batch):
            raise ValueError(
                f"global batch {self.global_batch} is not a multiple of micro batch {self.micro_batch} x data-parallel {self.dp}"
            )
        if self.model.tie_embeddings and self.pp > 1:
            raise ValueError(f"the model ties its embeddings, which live on two stages with pp {self.pp}; plan it with pp 1")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence parallelism cuts between tensor-parallel ranks, and tp is 1; raise tp or leave it out")
        self._check_cuts(parameters(replace(self.model, num_layers=1)))
        stage_layers(self.model.num_layers, 0, self.pp * self.chunks, self.layers)
        self.actions(0)

    def _check_cuts(self, like_all: list[Parameter]) -> None:
        """ValueError for parameters that tp can't cut, or names that LoRA's settings give and the model has not."""
        for p in like_all:
            shard(p, 0, self.tp)
        if self.lora_r:
            lora_parameters(like_all, self.lora_r, self.lora_targets)
            modules = {p.name.split(".")[-2] for p in like_all}
            if unknown := [name for name in self.lora_full if name not in modules]:
                known = ", ".join(sorted(modules))
                raise ValueError(f"lora_full names {unknown[0]!r}, but the model has no such module; it has {known}")

    @property
    def devices(self) -> int:
        return self.tp * self.pp * self.replicas

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights and see other tokens."""
        return self.cp * self.dp

    @property
    def pieces(self) -> int:
        """Parts of the residual stream, along the sequence, among the tensor-parallel ranks."""
        return self.tp if self.sequence_parallel else 1

    @property
    def share(self) -> int:
        """Tokens of a sample that a rank of the context axis sees, filled up to what can be cut."""
        unit = 2 * self.cp * self.pieces
        return self.seq if self.cp == 1 else -(-self.seq // unit) * unit // self.cp

    @property
    def micro_batches(self) -> int:
        """Of one data-parallel rank in one step."""
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def tokens(self) -> int:
        """Of one micro-batch, on one rank of the context axis."""
        return self.micro_batch * self.share

    @property
    def stream_tokens(self) -> int:
        """Of one micro-batch in the residual stream of one rank: with sequence parallelism a piece, filled up."""
        return self.micro_batch * -(-self.share // self.pieces)

    @property
    def gathered_tokens(self) -> int:
        """Of one micro-batch between `enter` and `exit` of a block."""
        return self.stream_tokens * self.pieces

    @property
    def width(self) -> int:
        """Bytes of a weight or an activation."""
        return BYTES[self.dtype]

    @cached_property
    def table(self) -> list[Parameter]:
        """Every parameter of the whole model, LoRA factors included."""
        base = parameters(self.model)
        return [*base, *lora_parameters(base, self.lora_r, self.lora_targets)] if self.lora_r else base

    @property
    def head(self) -> str:
        """The path of the parameter that makes the logits."""
        return "embed" if self.model.tie_embeddings else "head"

    @cached_property
    def block_table(self) -> list[Parameter]:
        """The parameters of one block; all blocks are alike."""
        return [p for p in self.table if p.layer == 0]

    def learns(self, p: Parameter) -> bool:
        """Whether a parameter is trained."""
        return not self.lora_r or p.path.endswith((".lora_a", ".lora_b")) or p.name.split(".")[-2] in self.lora_full

    def held(self, stage: int) -> list[Parameter]:
        """The parameters of a pipeline stage."""
        layers, first, last = set(self.blocks(stage)), stage == 0, stage == self.pp - 1
        ends = {"embed": first, "norm": last, "head": last}
        return [p for p, layer in self.placed if (ends[p.path] if layer is None else layer in layers)]

    @cached_property
    def placed(self) -> list[tuple[Parameter, int | None]]:
        """Every parameter and its layer."""
        return [(p, p.layer) for p in self.table]

    def blocks(self, stage: int) -> list[int]:
        """The layers of a pipeline stage."""
        count, virtual = self.model.num_layers, self.pp * self.chunks
        return [i for c in range(self.chunks) for i in stage_layers(count, c * self.pp + stage, virtual, self.layers)]

    def recomputed(self, layer: int) -> str:
        """What the backward pass computes again of a layer."""
        return self.recompute if layer % self.recompute_every == 0 else "none"

    def actions(self, stage: int) -> list[Action]:
        """What a stage does in one step."""
        return pipeline_schedule(self.schedule, stage, self.pp, self.micro_batches, self.chunks)


def local_shape(p: Parameter, job: Job, rank: int | None = None) -> tuple[int, ...]:
    """The shape of what a tensor-parallel rank holds; by default the last one, which has the remainder of the vocabulary."""
    piece = shard(p, job.tp - 1 if rank is None else rank, job.tp)
    if piece is None:
        return p.shape
    dim, start, stop = piece
    return (*p.shape[:dim], stop - start, *p.shape[dim + 1 :])
