"""What a run says while it goes: metrics.jsonl always, log lines, a live bar, and the trackers that are asked for."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pyalpaca.files import atomic_file
from pyalpaca.train.config import TrainConfig
from pyalpaca.train.metrics import log_line
from pyalpaca.train.trackers import open_trackers

Record = dict[str, Any]


def keep_records(path: Path, steps: int) -> list[Record]:
    """Drop the records of steps that the checkpoint does not know, so that the file continues without a seam; the others."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # A run that was killed may have left half a last line.
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps]
    with atomic_file(path) as partial:
        partial.write_text("".join(kept))
    return [json.loads(line) for line in kept]


def evaluation_line(record: Mapping[str, float], share: str) -> str:
    """The line of one evaluation, or of the test share at the end."""
    loss = record[f"{share}_loss"]
    perplexity = math.exp(min(loss, 700.0))
    name = {"valid": "validation", "test": "test"}[share]
    return (
        f"{name} loss at iteration {record['step']:8.0f} | lm loss: {loss:.6E} | perplexity: {perplexity:.4E} | "
        f"tokens: {record[f'{share}_tokens']:.0f}"
    )


@contextmanager
def journal(config: TrainConfig, run: Path, first: int) -> Iterator[Callable[[Record], None]]:
    """Yield what takes a record of each step; for one rank, the others have `silent`."""
    trackers = open_trackers(config, run)
    bar = tqdm(total=config.steps, initial=first, unit="step", desc="training", disable=None, file=sys.stderr)

    def write(record: Record) -> None:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        shares = [share for share in ("valid", "test") if f"{share}_loss" in record]
        if record["step"] % config.log_every == 0 or record["step"] == config.steps:
            tqdm.write(log_line(record, config.steps), file=sys.stdout)
        for share in shares:
            tqdm.write(evaluation_line(record, share), file=sys.stdout)
        for tracker in trackers:
            tracker.log({key: value for key, value in record.items() if key != "step"}, record["step"])
        bar.set_postfix_str(f"loss {record['loss']:.4f}, {record['tokens_per_second_per_device']:.0f} tokens/s/p", refresh=False)
        bar.update()

    try:
        yield write
    finally:
        bar.close()
        for tracker in trackers:
            tracker.close()


@contextmanager
def silent() -> Iterator[Callable[[Record], None]]:
    """The journal of a rank that says nothing."""
    yield lambda record: None
