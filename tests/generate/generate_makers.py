"""What the tests of the generate room share: a tiny model that talks nonsense, but with a tokenizer of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyalpaca.checkpoint import memory_reader, write_hf
from pyalpaca.data import write_tokenizer_folder
from pyalpaca.demo.make_model import RECORDS, train_tokenizer
from pyalpaca.generate.engine import generate_ids, generate_text, load_model
from pyalpaca.generate.sampling import Sampling
from pyalpaca.model import LlamaConfig, flatten, init, parameters

PIECES = 601  # tp 2 does not divide it
MODEL = LlamaConfig(
    vocab_size=PIECES,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    max_positions=128,
)


def make_model(folder: Path, config: LlamaConfig = MODEL) -> Path:
    """A Hugging Face folder with weights large enough that the next token depends on the prompt."""
    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    words = folder.with_name("words")
    train_tokenizer((r["instruction"] + "\n" + r["output"] for r in records if r["output"].isascii()), PIECES, words / "sp.model")
    write_tokenizer_folder(words / "sp.model", words / "hf")
    fresh = flatten(init(parameters(config), seed=11))
    tensors = {p.name: fresh[p.path] * (8 if fresh[p.path].dim() > 1 else 1) for p in parameters(config)}
    write_hf(memory_reader(config, tensors, words / "hf"), folder)
    return folder


def answers(folder: str, prompts: list[list[int]], text: str, tp: int) -> dict[str, Any]:
    """Greedy and sampled ids of each prompt, and the text, of a model on `tp` processes."""
    model = load_model(folder, tp=tp)
    draw = Sampling(temperature=0.9, top_k=50, top_p=0.9, repetition_penalty=1.1)
    return {
        "greedy": [list(generate_ids(model, prompt, 12)) for prompt in prompts],
        "sampled": [list(generate_ids(model, prompt, 12, draw, seed=3)) for prompt in prompts],
        "text": "".join(generate_text(model, text, 12)),
    }
