"""What the tests of the train room share: a tiny model on disk, a prepared data set, and runs of a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyalpaca.checkpoint import memory_reader, write_hf, write_native
from pyalpaca.data import Job, load_tokenizer, preprocess, write_tokenizer_folder
from pyalpaca.demo.make_model import RECORDS, train_tokenizer
from pyalpaca.model import LlamaConfig, flatten, init, parameters
from pyalpaca.train import TrainConfig, train

PIECES = 421  # 2 divides it as little as 8
MODEL = LlamaConfig(
    vocab_size=PIECES, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, norm_eps=1e-5
)


def make_road(folder: Path) -> None:
    """folder/tokenizer, folder/data (English records, indexed), folder/hf and folder/native (one fresh model, twice)."""
    records = [r for r in json.loads(RECORDS.read_text(encoding="utf-8")) if r["output"].isascii() and r["instruction"].isascii()]
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer((f"{r['instruction']}\n{r['input']}\n{r['output']}" for r in records), PIECES, folder / "sp.model")
    write_tokenizer_folder(folder / "sp.model", folder / "tokenizer")
    (folder / "records.json").write_text(json.dumps(records[:60]))
    job = Job(
        folder / "records.json",
        str(folder / "data"),
        folder / "tokenizer",
        handler="GeneralInstructionHandler",
        prompt_template="none",
        append_eod=True,
    )
    preprocess(job)
    assert load_tokenizer(folder / "tokenizer").vocab_size == PIECES
    table, fresh = parameters(MODEL), flatten(init(parameters(MODEL), seed=5))
    # Larger than a fresh model's weights, so that a few steps move the loss.
    reader = memory_reader(
        MODEL, {p.name: fresh[p.path] * (4 if fresh[p.path].dim() > 1 else 1) for p in table}, folder / "tokenizer"
    )
    write_hf(reader, folder / "hf")
    write_native(reader, folder / "native")


def settings(road: Path, output: Path, **changes: Any) -> TrainConfig:
    """A run of four steps on the road's model and data; `changes` are fields of TrainConfig."""
    usual = {"steps": 4, "lr": 5e-3, "micro_batch_size": 2, "global_batch_size": 8, "seq_length": 48, "warmup_steps": 1}
    return TrainConfig(**{"model": str(road / "hf"), "data": str(road / "data"), "output": str(output), **usual, **changes})


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in records(run)]


def train_all(configs: list[TrainConfig]) -> None:
    """What `launch` starts in each process: these runs, one after the other."""
    for config in configs:
        train(config)
