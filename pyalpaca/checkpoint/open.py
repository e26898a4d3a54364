"""The one door in: a path of any layout, with or without LoRA adapters, becomes a Reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyalpaca.checkpoint.adapter import is_adapter
from pyalpaca.checkpoint.canonical import Reader
from pyalpaca.checkpoint.container.tensor_file import dtype_name
from pyalpaca.checkpoint.gguf_model import find_gguf, open_gguf
from pyalpaca.checkpoint.hf import is_hf, open_hf
from pyalpaca.checkpoint.lora import merged
from pyalpaca.checkpoint.megatron import find_megatron, open_megatron
from pyalpaca.checkpoint.meta import is_meta, open_meta
from pyalpaca.checkpoint.native import find_native, open_native


def open_checkpoint(path: str | Path, *, lora: Sequence[str | Path] = (), vocab_size: int | None = None) -> Reader:
    """Open a model in Meta's, Hugging Face's, Megatron's (DeepSpeed's), llama.cpp's or our own layout, lazily.

    The layout is recognised.

    lora: adapters, merged in this order in the view that is returned (see `merged`).
    vocab_size: of the real vocabulary, where the folder does not say it (Megatron pads it) or says it wrong (config.json).
    Raises ValueError or FileNotFoundError, one sentence, for anything that is missing, damaged or does not fit together.
    """
    where = Path(path)
    if not where.exists():
        raise FileNotFoundError(f"{where}: not found, expected a checkpoint folder; check the path")
    if not where.is_dir() and where.suffix != ".gguf":
        raise ValueError(f"{where}: is a file, expected the folder that holds the checkpoint; give {where.parent}")
    reader = _open(where, vocab_size)
    for name, dtype in reader.dtypes.items():
        if not dtype.is_floating_point:
            raise ValueError(f"{where}: {name} is {dtype_name(dtype)}, expected floating-point weights; take another file")
    if vocab_size not in (None, reader.config.vocab_size):
        raise ValueError(
            f"{where}: has a vocabulary of {reader.config.vocab_size}, {vocab_size} was given; leave the vocabulary size out"
        )
    return merged(reader, [Path(adapter) for adapter in lora]) if lora else reader


def _open(path: Path, vocab_size: int | None) -> Reader:
    if path.is_file():
        return open_gguf(path)
    if find_native(path) is not None:
        return open_native(path)
    if is_meta(path) and is_hf(path):
        raise ValueError(f"{path}: holds both Meta's consolidated.NN.pth and Hugging Face's weights; move one of the models away")
    if is_meta(path):
        return open_meta(path)
    if is_hf(path):
        return open_hf(path, vocab_size)
    if find_megatron(path) is not None:
        return open_megatron(path, vocab_size)
    gguf = find_gguf(path)
    if gguf is not None:
        return open_gguf(gguf)
    if is_adapter(path):
        raise ValueError(
            f"{path}: is a LoRA adapter, expected a base model; name the base model here and give this folder as the adapter"
        )
    present = ", ".join(sorted(f.name for f in path.iterdir())[:5]) or "nothing"
    raise ValueError(
        f"{path}: no checkpoint recognised (it holds {present}); expected consolidated.NN.pth with params.json, "
        f"pytorch_model*.bin or model*.safetensors with config.json, latest_checkpointed_iteration.txt, manifest.json, "
        f"or a .gguf file"
    )
