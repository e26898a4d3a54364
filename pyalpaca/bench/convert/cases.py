"""The cases of the benchmark, and what a run of them takes: which models, one after the other, and how much of the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyalpaca.bench.convert.model import ADAPTERS, ALPACA_ROWS, BASE_ROWS, Scale, half

PEERS = ("cp", "peft")
_PARALLEL = {"tp": 4, "pp": 2}


@dataclass(frozen=True)
class Case:
    """One conversion that is measured.

    source: `base` or `megatron`; to: a layout of `convert`; lora: both adapters are merged; options: more for `convert`.
    """

    text: str
    to: str
    source: str = "base"
    lora: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "merge-hf": Case("two adapters merged, to .bin files cut as the base's", "hf", lora=True),
    "merge-pth": Case("two adapters merged, to Meta's .pth", "meta", lora=True),
    "hf-megatron": Case("Hugging Face cut for tensor-parallel 4 and pipeline-parallel 2", "megatron", options=_PARALLEL),
    "megatron-hf": Case("back again, to safetensors", "hf", source="megatron", options={"vocab_size": BASE_ROWS}),
    "hf-safetensors": Case("Hugging Face's .bin to safetensors", "hf", options={"weights": "safetensors"}),
}


@dataclass(frozen=True)
class Settings:
    """What is measured and how.

    peft_scale: of the model that is merged beside peft. work: the folder of everything written. repeats: rounds that count.
    cache: `warm` or `cold`. halved: each case also with half the layers. keep: the models stay for the next run.
    """

    scale: Scale
    peft_scale: Scale
    work: Path
    cases: tuple[str, ...]
    peers: tuple[str, ...]
    repeats: int = 3
    cache: str = "warm"
    halved: bool = True
    keep: bool = False

    @property
    def out(self) -> Path:
        """Where our results go."""
        return self.work / "out"

    @property
    def copy(self) -> Path:
        """Where cp's and peft's go."""
        return self.work / "copy"


@dataclass(frozen=True)
class Stage:
    """One synthetic model, the cases it is made for, and how many results stand beside ours."""

    scale: Scale
    weights: str
    cases: tuple[str, ...]
    copies: int

    @property
    def name(self) -> str:
        """Of the model's folder."""
        return f"{self.scale.name}-{self.weights}"

    @property
    def megatron(self) -> bool:
        return any(CASES[name].source == "megatron" for name in self.cases)

    def source_bytes(self) -> int:
        """Bytes of all that is read: the base, the adapters, the Megatron shards."""
        total = self.scale.parameters(BASE_ROWS) + sum(self.scale.adapter_parameters(r, rows) for _, r, _, rows in ADAPTERS)
        if self.megatron:
            total += self.scale.parameters(_padded(BASE_ROWS))
        return 2 * total

    def output_bytes(self) -> int:
        """Bytes of the largest result, and of those that stand beside it."""
        rows = ALPACA_ROWS if any(CASES[name].lora for name in self.cases) else _padded(BASE_ROWS)
        return 2 * self.scale.parameters(rows) * (1 + self.copies)


def _padded(rows: int) -> int:
    step = 128 * _PARALLEL["tp"]
    return -(-rows // step) * step


def stages(settings: Settings) -> list[Stage]:
    """The models of a run in order: the one that is asked for, the one with half the layers, the one for peft."""
    found = [Stage(settings.scale, "bin", settings.cases, int("cp" in settings.peers))]
    if settings.halved:
        found.append(Stage(half(settings.scale), "bin", settings.cases, 0))
    if "peft" in settings.peers:
        found.append(Stage(settings.peft_scale, "safetensors", ("merge-hf",), 1))
    return found


def needed_bytes(settings: Settings) -> int:
    """Bytes of disk that a run takes at most: the weights, and some room for what is not weights."""
    every = stages(settings)
    if settings.keep:
        total = sum(stage.source_bytes() for stage in every) + max(stage.output_bytes() for stage in every)
    else:
        total = max(stage.source_bytes() + stage.output_bytes() for stage in every)
    return total + total // 50 + (64 << 20)
