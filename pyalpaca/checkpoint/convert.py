"""Any layout to any other: a writer after a reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyalpaca.checkpoint.canonical import DTYPES, Reader, cast
from pyalpaca.checkpoint.hf import write_hf
from pyalpaca.checkpoint.megatron_writer import write_megatron
from pyalpaca.checkpoint.meta import write_meta
from pyalpaca.checkpoint.native import write_native
from pyalpaca.checkpoint.open import open_checkpoint

LAYOUTS = ("hf", "meta", "megatron", "deepspeed", "native")


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    lora: Sequence[str | Path] = (),
    vocab_size: int | None = None,
    dtype: str | None = None,
    tp: int = 1,
    pp: int = 1,
    dialect: str = "A",
    merge_mlp: bool = False,
    divisible_by: int = 128,
    weights: str = "safetensors",
    max_shard_size: str = "5GB",
    num_shards: int | None = None,
) -> Reader:
    """Write the model in `source`, adapters merged in, to `out` in the layout `to`; returns the reader that was written.

    Raises ValueError or FileNotFoundError, one sentence, before anything is written.
    """
    if to not in LAYOUTS:
        raise ValueError(f"layout {to!r} is not one of {', '.join(LAYOUTS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    reader = cast(open_checkpoint(source, lora=lora, vocab_size=vocab_size), DTYPES[dtype] if dtype else None)
    folder = Path(out)
    if to == "hf":
        write_hf(reader, folder, weights=weights, max_shard_size=max_shard_size)
    elif to == "meta":
        write_meta(reader, folder, num_shards=num_shards)
    elif to == "native":
        write_native(reader, folder)
    else:
        write_megatron(
            reader,
            folder,
            tp=tp,
            pp=pp,
            dialect=dialect,
            deepspeed=to == "deepspeed",
            merge_mlp=merge_mlp,
            divisible_by=divisible_by,
        )
    return reader


def merge(
    base: str | Path, lora: Sequence[str | Path], out: str | Path, to: str = "hf", *, num_shards: int | None = None
) -> Reader:
    """Merge adapters into `base` and write `hf` or `meta`; a base in .bin gives .bin, cut as the base is, else safetensors.

    Raises ValueError or FileNotFoundError, one sentence, before anything is written.
    """
    if to not in ("hf", "meta"):
        raise ValueError(f"layout {to!r} is not one of hf, meta; use `pyalpaca convert --lora` for others")
    if not lora:
        raise ValueError("no adapter given to merge; name at least one")
    reader = open_checkpoint(base, lora=lora)
    if to == "meta":
        write_meta(reader, Path(out), num_shards=num_shards)
    else:
        weights = "bin" if any(name.endswith(".bin") for name in reader.files.values()) else "safetensors"
        write_hf(reader, Path(out), weights=weights, files=reader.files)
    return reader
