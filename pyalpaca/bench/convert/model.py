"""A LLaMA of any size and its two Chinese adapters with random weights, in the files that users have.

The base is a Hugging Face folder of two files in fp16, as LLaMA-7B is published (9.98 GB + 3.5 GB in .bin); the adapters have
the shapes of Chinese-LLaMA-Plus (r 8, alpha 32, 49953 rows) and Chinese-Alpaca-Plus (r 64, alpha 128, 49954 rows): seven
projections, embedding and head in full, fp16 in .bin. Smaller scales have fewer layers and less width; vocabularies and
tokenizers are the real ones at every scale.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyalpaca

if TYPE_CHECKING:
    from torch import Tensor

    from pyalpaca.model import LlamaConfig

BASE_ROWS, PLUS_ROWS, ALPACA_ROWS = 32000, 49953, 49954
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = (("llama-plus", 8, 32, PLUS_ROWS), ("alpaca-plus", 64, 128, ALPACA_ROWS))
"""name, r, lora_alpha, rows of the vocabulary"""

_TOKENIZERS = Path(pyalpaca.__file__).parent / "demo" / "data"


@dataclass(frozen=True)
class Scale:
    """The shape of a synthetic model, its name in the results first."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int

    def parameters(self, rows: int) -> int:
        """How many numbers the model has with a vocabulary of `rows`."""
        layer = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.num_layers * layer + (2 * rows + 1) * self.hidden_size

    def adapter_parameters(self, r: int, rows: int) -> int:
        """How many numbers an adapter has: seven pairs of factors a layer, embedding and head."""
        layer = r * (4 * 2 * self.hidden_size + 3 * (self.hidden_size + self.intermediate_size))
        return self.num_layers * layer + 2 * rows * self.hidden_size


SCALES = {
    scale.name: scale
    for scale in (
        Scale("7b", 32, 4096, 11008, 32),
        Scale("1b", 16, 2048, 5504, 16),
        Scale("small", 12, 1536, 4096, 12),
        Scale("tiny", 4, 64, 176, 4),
    )
}


def parse_scale(text: str) -> Scale:
    """A scale by its name, or a fraction of the 7B's layers at full width: `0.25` has eight. ValueError for anything else."""
    if text in SCALES:
        return SCALES[text]
    whole = SCALES["7b"]
    try:
        layers = round(float(text) * whole.num_layers)
    except (ValueError, OverflowError):
        layers = 0
    if not 4 <= layers <= whole.num_layers:
        raise ValueError(f"{text!r} is no scale; give one of {', '.join(SCALES)}, or a fraction of the 7B's layers, 0.125 to 1")
    return whole if layers == whole.num_layers else replace(whole, name=f"{layers / whole.num_layers:g}", num_layers=layers)


def half(scale: Scale) -> Scale:
    """The same model with half the layers."""
    return replace(scale, name=f"{scale.name}-half", num_layers=scale.num_layers // 2)


def llama_config(scale: Scale, rows: int) -> LlamaConfig:
    """The config of the model with a vocabulary of `rows`."""
    from pyalpaca.model import LlamaConfig

    heads = scale.num_heads
    return LlamaConfig(
        rows, scale.hidden_size, scale.intermediate_size, scale.num_layers, heads, heads, scale.hidden_size // heads
    )


def make(scale: Mapping[str, Any], out: str, weights: str) -> Callable[[], None]:
    """Prepare to write out/base, out/llama-plus and out/alpaca-plus; a job for run_fresh.

    scale: the fields of a Scale. weights: `bin` or `safetensors`, the kind of the base's files.
    """
    import torch

    from pyalpaca.checkpoint import Reader, write_adapter, write_hf
    from pyalpaca.data import merge_tokenizers, write_tokenizer_folder
    from pyalpaca.files import atomic_folder
    from pyalpaca.model import lora_parameters, parameters, whole_slice

    size = Scale(**scale)
    config = llama_config(size, BASE_ROWS)
    shapes = {p.name: p.shape for p in parameters(config)}

    def work() -> None:
        with atomic_folder(out) as folder:
            words = folder / "base-tokenizer"
            write_tokenizer_folder(_TOKENIZERS / "llama-tokenizer.model", words)
            base = Reader(
                layout="memory",
                path=folder,
                config=config,
                shapes=shapes,
                dtypes=dict.fromkeys(shapes, torch.float16),
                fetch=lambda name, piece: whole_slice(random_half(f"base {name}", shapes[name]), piece),
                tokenizer=words,
            )
            # Two files, the first with three quarters of the bytes: at 7B this is the published cut.
            write_hf(base, folder / "base", weights=weights, max_shard_size=str(size.parameters(BASE_ROWS) * 2 * 20 // 27))
            for name, r, alpha, rows in ADAPTERS:
                merged = folder / f"{name}-tokenizer"
                merge_tokenizers(
                    _TOKENIZERS / "llama-tokenizer.model",
                    _TOKENIZERS / "chinese_sp.model",
                    folder / f"{name}.model",
                    add_pad=rows == ALPACA_ROWS,
                )
                write_tokenizer_folder(folder / f"{name}.model", merged)
                table = parameters(llama_config(size, rows))
                held = [*(p for p in table if p.path in ("embed", "head")), *lora_parameters(table, r, TARGETS)]
                write_adapter(
                    folder / name,
                    {p.name: random_half(f"{name} {p.name}", p.shape) for p in held},
                    r=r,
                    lora_alpha=alpha,
                    target_modules=TARGETS,
                    weights="bin",
                    tokenizer=merged,
                )

    return work


def random_half(name: str, shape: tuple[int, ...]) -> Tensor:
    """A random fp16 tensor, always the same for the same name; +- 0.008 to 0.031, a LLaMA's weights are spread by 0.02.

    Random bits with all but the lowest bit of the exponent set fast: sampling a distribution would take many times as long.
    """
    import numpy as np
    import torch

    count = int(np.prod(shape))
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(-(-count // 4))
    bits &= np.uint64(0x87FF87FF87FF87FF)
    bits |= np.uint64(0x2000200020002000)
    return torch.from_numpy(bits.view(np.float16)[:count]).reshape(shape)
