"""What trains: the sizes of the model, and the contestants by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyalpaca.model import LlamaConfig


@dataclass(frozen=True)
class Scale:
    """A model's shape, and of a step the sequence in tokens and the sequences in a batch."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    seq_length: int
    batch: int


SCALES = {
    scale.name: scale
    for scale in (
        Scale("97m", 768, 12, 12, 2048, 8192, 512, 2),
        Scale("wide", 768, 12, 12, 2048, 49954, 2048, 1),
        Scale("tiny", 64, 2, 4, 128, 256, 32, 2),
    )
}


def model_config(scale: Scale) -> LlamaConfig:
    """The model of a scale; torch comes with it, so only where something is trained."""
    from pyalpaca.model import LlamaConfig

    return LlamaConfig(
        vocab_size=scale.vocab_size,
        hidden_size=scale.hidden_size,
        intermediate_size=scale.intermediate_size,
        num_layers=scale.num_layers,
        num_heads=scale.num_heads,
        num_kv_heads=scale.num_heads,
        head_dim=scale.hidden_size // scale.num_heads,
        norm_eps=1e-5,
    )


@dataclass(frozen=True)
class Contestant:
    """Who trains. group: those of one group see the same tokens in a step, and are compared with each other.

    batches: of the scale's size, in one step. processes, tp, pp: of the layout; two processes have a thread each.
    """

    text: str
    module: str
    group: str = "step"
    dtype: str = "fp32"
    recompute: str = "none"
    compiled: bool = False
    batches: int = 1
    processes: int = 1
    tp: int = 1
    pp: int = 1


_LAYOUT_BATCHES = 4  # of one sequence or more each: what a pipeline needs to fill its stages

CONTESTANTS = {
    "ours": Contestant("pyalpaca in fp32", "ours"),
    "ours-recomputed": Contestant("pyalpaca in fp32, selective recomputation", "ours", recompute="selective"),
    "ours-bf16": Contestant("pyalpaca with bf16 weights and activations", "ours", dtype="bf16"),
    "transformers": Contestant("transformers, eager", "peer"),
    "transformers-compiled": Contestant("transformers under torch.compile", "peer", compiled=True),
    "transformers-bf16": Contestant("transformers in bf16 (minutes a step on most CPUs)", "peer", dtype="bf16"),
    "one": Contestant("pyalpaca, one process with all threads", "ours", "layout", batches=_LAYOUT_BATCHES),
    "tp2": Contestant("two processes, tensor parallel", "ours", "layout", batches=_LAYOUT_BATCHES, processes=2, tp=2),
    "pp2": Contestant("two processes, pipeline parallel", "ours", "layout", batches=_LAYOUT_BATCHES, processes=2, pp=2),
    "dp2": Contestant("two processes, data parallel", "ours", "layout", batches=_LAYOUT_BATCHES, processes=2),
}
REFERENCE = {"step": "ours", "layout": "one"}
"""Of each group the one that the others are compared with."""
DEFAULT = tuple(name for name in CONTESTANTS if name != "transformers-bf16")
