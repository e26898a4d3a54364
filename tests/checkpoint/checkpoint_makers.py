"""Small models, tokenizers and adapters in the formats that users bring."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import torch
from torch import Tensor

from pyalpaca.checkpoint import Reader, memory_reader, write_adapter, write_hf
from pyalpaca.model import LlamaConfig, parameters

BASE_VOCAB, PLUS_VOCAB, ALPACA_VOCAB = 97, 153, 154  # 8 divides none of them, as with 49953 and 49954
CONFIG = LlamaConfig(
    vocab_size=BASE_VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=8,
    num_kv_heads=8,
    head_dim=8,
    norm_eps=1e-6,
)


def tensors(config: LlamaConfig = CONFIG, dtype: torch.dtype = torch.float16, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {p.name: (torch.randn(p.shape, generator=generator) * 0.1).to(dtype) for p in parameters(config)}


def model(config: LlamaConfig = CONFIG, dtype: torch.dtype = torch.float16, tokenizer: Path | None = None) -> Reader:
    return memory_reader(config, tensors(config, dtype), tokenizer)


def make_tokenizer(folder: Path, vocab_size: int) -> Path:
    """A folder with a SentencePiece model of just this size."""
    from sentencepiece import SentencePieceTrainer

    folder.mkdir(parents=True, exist_ok=True)
    choose = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(choose.choices(letters, k=choose.randint(2, 7))) for _ in range(300)]
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(choose.choices(words, k=12)) for _ in range(200)))
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        minloglevel=2,
        num_threads=1,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    return folder


def make_adapter(
    folder: Path,
    *,
    r: int = 4,
    alpha: float = 8,
    vocab: int | None = None,
    tokenizer: Path | None = None,
    targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj"),
    config: LlamaConfig = CONFIG,
    seed: int = 1,
    weights: str = "bin",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A PEFT adapter folder: factors for `targets` in every layer and, with `vocab`, full embeddings and head."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for p in parameters(config):
        if p.name.split(".")[-2] in targets and p.layer is not None:
            out, into = p.shape
            stem = p.name.removesuffix(".weight")
            made[f"{stem}.lora_A.weight"] = (torch.randn(r, into, generator=generator) * 0.3).to(dtype)
            made[f"{stem}.lora_B.weight"] = (torch.randn(out, r, generator=generator) * 0.3).to(dtype)
    if vocab:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            made[name] = torch.randn(vocab, config.hidden_size, generator=generator).to(dtype)
    write_adapter(folder, made, r=r, lora_alpha=alpha, target_modules=targets, weights=weights, tokenizer=tokenizer)
    return folder


def add_pad(folder: Path) -> Path:
    """Name a [PAD] in special_tokens_map.json, one id more than the pieces, as the Alpaca adapters do."""
    path = folder / "special_tokens_map.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "[PAD]"}))
    return folder


def make_hf(folder: Path, reader: Reader | None = None, **how) -> Path:
    write_hf(reader or model(), folder, **how)
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    """{path: sha256} of everything below a folder, to see that nothing was written."""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else "folder"
        for f in sorted(folder.rglob("*"))
    }
