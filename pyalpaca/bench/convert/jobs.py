"""The work that `pyalpaca bench convert` measures, each a job for a fresh process: imports first, then the work alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def merge(base: str, adapters: Sequence[str], out: str, to: str) -> Callable[[], None]:
    """`pyalpaca merge`: adapters into a base, to `hf` or `meta`."""
    from pyalpaca.checkpoint import merge

    def work() -> None:
        merge(base, adapters, out, to)

    return work


def convert(source: str, out: str, to: str, options: Mapping[str, Any]) -> Callable[[], None]:
    """`pyalpaca convert`: any layout to any other."""
    from pyalpaca.checkpoint import convert

    def work() -> None:
        convert(source, out, to, **options)

    return work


def peft(base: str, adapters: Mapping[str, int], out: str) -> Callable[[], None]:
    """The same merge with transformers and peft, as their documentation shows it, one adapter after the other.

    adapters: {folder: rows of its vocabulary}. The vocabulary is grown without the mean of the old rows, which would cost
    seconds for nothing: each adapter brings all rows itself.
    """
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    def work() -> None:
        model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float16)
        for adapter, rows in adapters.items():
            model.resize_token_embeddings(rows, mean_resizing=False)
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        model.save_pretrained(out)

    return work


def check(base: str, adapters: Sequence[str], out: str) -> Callable[[], None]:
    """Whether `out` holds the merged model: every shape, and the embedding, the last layer, the last norm and the head bit for
    bit. ValueError if not: a fast wrong result is worth nothing.
    """
    import torch

    from pyalpaca.checkpoint import open_checkpoint

    def work() -> None:
        expected = open_checkpoint(base, lora=adapters)
        found = open_checkpoint(out, vocab_size=expected.config.vocab_size)
        names = expected.names
        wrong = [n for n in names if found.shapes.get(n) != expected.shapes[n]]
        wrong = wrong or [n for n in (names[0], *names[-11:]) if not torch.equal(found.read(n), expected.read(n))]
        if wrong:
            raise ValueError(f"{out}: {wrong[0]} is not what was to be written; `pyalpaca diff` says how it differs")

    return work


def compare(a: str, b: str) -> Callable[[], dict[str, Any]]:
    """`pyalpaca diff`: the summary of two checkpoints' differences."""
    from pyalpaca.checkpoint import diff, diff_summary, open_checkpoint

    return lambda: diff_summary(diff(open_checkpoint(a), open_checkpoint(b)))
