"""Any layout to any other: a plan over a reader, carried out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyalpaca.checkpoint.canonical import DTYPES, Reader, cast
from pyalpaca.checkpoint.container.torch_layout import CONTAINERS, DEFAULT_CONTAINER
from pyalpaca.checkpoint.gguf_model import GGUF_TYPES, plan_gguf
from pyalpaca.checkpoint.hf import plan_hf
from pyalpaca.checkpoint.megatron_writer import plan_megatron
from pyalpaca.checkpoint.meta import plan_meta
from pyalpaca.checkpoint.native import plan_native
from pyalpaca.checkpoint.open import open_checkpoint
from pyalpaca.checkpoint.plan import Plan, execute

LAYOUTS = ("hf", "meta", "megatron", "deepspeed", "native", "gguf")
_GGUF_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_QUANTIZED = [kind for kind in GGUF_TYPES if kind not in _GGUF_DTYPES.values()]
_PARALLEL = ("megatron", "deepspeed")
_USED_BY = {
    **dict.fromkeys(("tp", "pp", "dialect", "merge_mlp", "divisible_by", "padding"), _PARALLEL),
    "weights": ("hf",),
    "max_shard_size": ("hf",),
    "num_shards": ("meta",),
    "container": ("hf", "meta", *_PARALLEL),
}


@dataclass(frozen=True)
class Output:
    """How a model is to be written; ValueError for a setting that the layout has no use for.

    dtype: of all tensors; None: as they are; gguf also `q8_0` and `q4_0`.
    tp, pp, dialect, merge_mlp, divisible_by, padding: megatron and deepspeed.
    weights, max_shard_size: hf. num_shards: meta; None: as Meta published that size. container: of files as torch.save's.
    """

    layout: str
    dtype: str | None = None
    tp: int = 1
    pp: int = 1
    dialect: str = "A"
    merge_mlp: bool = False
    divisible_by: int = 128
    padding: str = "copy"
    weights: str = "safetensors"
    max_shard_size: str = "5GB"
    num_shards: int | None = None
    container: str = DEFAULT_CONTAINER

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} is not one of {', '.join(LAYOUTS)}")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value != f.default and self.layout not in _USED_BY.get(f.name, LAYOUTS):
                raise ValueError(
                    f"{f.name.replace('_', ' ')} {value} is for {', '.join(_USED_BY[f.name])}; the layout {self.layout} has no "
                    f"use for it, leave it out"
                )


def plan_conversion(reader: Reader, output: Output) -> Plan:
    """The plan that writes a reader's model. ValueError for a model that can't be written so."""
    dtypes = [*DTYPES, *_QUANTIZED] if output.layout == "gguf" else DTYPES
    for what, value, known in (
        ("dtype", output.dtype or "float16", dtypes),
        ("container", output.container, CONTAINERS),
    ):
        if value not in known:
            raise ValueError(f"{what} {value!r} is not one of {', '.join(known)}")
    if output.layout == "gguf":
        return plan_gguf(reader, dtype=_GGUF_DTYPES.get(output.dtype or "", output.dtype))
    reader = cast(reader, DTYPES[output.dtype] if output.dtype else None)
    if output.layout == "hf":
        return plan_hf(reader, weights=output.weights, max_shard_size=output.max_shard_size, container=output.container)
    if output.layout == "meta":
        return plan_meta(reader, num_shards=output.num_shards, container=output.container)
    if output.layout == "native":
        return plan_native(reader)
    return plan_megatron(
        reader,
        tp=output.tp,
        pp=output.pp,
        dialect=output.dialect,
        deepspeed=output.layout == "deepspeed",
        merge_mlp=output.merge_mlp,
        divisible_by=output.divisible_by,
        padding=output.padding,
        container=output.container,
    )


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    lora: Sequence[str | Path] = (),
    vocab_size: int | None = None,
    **output: Any,
) -> Reader:
    """Write the model in `source`, adapters merged in, to `out` in the layout `to`; returns the reader that was written.

    output: more fields of `Output`. Raises ValueError or FileNotFoundError, one sentence, before anything is written.
    """
    planned = plan_conversion(open_checkpoint(source, lora=lora, vocab_size=vocab_size), Output(to, **output))
    execute(planned, out)
    return planned.reader


def plan_merge(base: str | Path, lora: Sequence[str | Path], output: Output) -> Plan:
    """The merge of adapters into `base`, as `hf` or `meta`; a base in .bin gives .bin, cut as the base is, else safetensors.

    The tensors keep the order that they have in a .bin base, as in the original merge: older releases of transformers have
    another one than today's, and it is part of the hash of a file. Raises ValueError or FileNotFoundError, one sentence.
    """
    if output.layout not in ("hf", "meta"):
        raise ValueError(f"layout {output.layout!r} is not one of hf, meta; use `pyalpaca convert --lora` for others")
    if not lora:
        raise ValueError("no adapter given to merge; name at least one")
    reader = open_checkpoint(base, lora=lora)
    weights = "bin" if any(name.endswith(".bin") for name in reader.files.values()) else "safetensors"
    if output.layout == "meta":
        order = list(reader.files) if weights == "bin" else ()
        return plan_meta(reader, num_shards=output.num_shards, container=output.container, order=order)
    return plan_hf(reader, weights=weights, files=reader.files, container=output.container)


def merge(base: str | Path, lora: Sequence[str | Path], out: str | Path, to: str = "hf", **output: Any) -> Reader:
    """Merge adapters into `base` and write it, see `plan_merge`; returns the reader that was written."""
    planned = plan_merge(base, lora, Output(to, **output))
    execute(planned, out)
    return planned.reader
