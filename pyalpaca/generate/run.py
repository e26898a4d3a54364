"""`pyalpaca generate` and `python -m pyalpaca.generate`: answer prompts on the terminal, as a stream."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_END = ("q", "quit", "exit")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="pyalpaca generate",
        description="Answer prompts with a model in any layout. Without --prompt or --prompts-file, they are read line by line.",
        epilog='example: torchrun --nproc_per_node 2 -m pyalpaca.generate --model DIR --tp 2 --template alpaca --prompt "你好"',
    )
    p.add_argument("--model", required=True, help="model folder in any layout (Hugging Face, Meta, Megatron, native, a run)")
    p.add_argument("--lora", default="", metavar="A,B", help="adapters merged into the model on the way, in order")
    p.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer, where the model folder has none")
    p.add_argument("--vocab-size", type=int, metavar="N", help="real vocabulary of a Megatron folder without config.json")
    p.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel size, the number of processes (default 1)")
    p.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: fp32 on a CPU, else the model's own"
    )
    p.add_argument(
        "--quantize",
        choices=("none", "int8", "int4"),
        default="none",
        help="store projections and head as integers of 8 or 4 bits, made while loading: a quarter or a sixth of fp32's memory, "
        "and faster, since a token costs reading them once; int8 is hardly less exact than bf16, int4 noticeably (default none)",
    )
    p.add_argument(
        "--quantize-group",
        type=int,
        choices=(32, 64, 128, 256),
        metavar="N",
        help="weights of a row that share a scale, 32, 64, 128 or 256: fewer are more exact (default: a whole row for int8, 32 "
        "for int4)",
    )
    p.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "fp32", "bf16", "fp16", "int8"),
        default="auto",
        help="what keys and values of earlier tokens are kept as: int8 takes a quarter of fp32's memory and time to read, "
        "at some precision (default auto: like the model)",
    )
    p.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    p.add_argument("--prompts-file", metavar="FILE", help="prompts, one a line")
    p.add_argument(
        "--template", default="none", metavar="NAME", help="what stands around a prompt: none, alpaca, alpaca-cli, ascendspeed"
    )
    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer in tokens (default 256)")
    p.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: always the most likely token (default 0)")
    p.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="at a temperature: draw among the N most likely tokens (default 0: all)"
    )
    p.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="at one: draw among the likely tokens that make up X (default 1: all)",
    )
    p.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less (default 1)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end an answer before this text; may be repeated")
    p.add_argument("--output", metavar="FILE", help="also write {prompt, answer, ids} as JSON lines")
    return p


def _given(args: argparse.Namespace) -> list[str] | None:
    """The prompts that the command line names, in order; None if they come from the terminal."""
    if not args.prompt and not args.prompts_file:
        return None
    prompts = [*(args.prompt or [])]
    if args.prompts_file:
        path = Path(args.prompts_file)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found, expected a text file with one prompt a line; check --prompts-file")
        try:
            prompts += [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8 text ({error}), expected one prompt a line") from None
    return prompts


def _asked() -> Iterator[str]:
    """Prompts from the terminal, until it ends or one of q, quit, exit."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip().lower() in _END:
            return
        if line.strip():
            yield line.rstrip("\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Answer prompts as the command line says."""
    args = parser().parse_args(argv)
    given = _given(args)
    import torch

    from pyalpaca.data import find_template, generation_prompt
    from pyalpaca.files import atomic_file
    from pyalpaca.generate.engine import generate_text, load_model
    from pyalpaca.generate.sampling import Sampling
    from pyalpaca.ops import reuse_memory
    from pyalpaca.parallel import broadcast_object, close_mesh

    reuse_memory()
    template = find_template(args.template)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    dtypes = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
    lora = [name.strip() for name in args.lora.split(",") if name.strip()]
    if args.quantize_group and args.quantize == "none":
        raise ValueError("found --quantize-group without --quantize, which alone uses it; give --quantize int8 or int4")
    model = load_model(
        args.model,
        lora=lora,
        tokenizer=args.tokenizer,
        tp=args.tp,
        dtype=dtypes[args.dtype],
        vocab_size=args.vocab_size,
        bits={"none": None, "int8": 8, "int4": 4}[args.quantize],
        group=args.quantize_group,
        cache_dtype=dtypes[args.kv_cache_dtype],
    )
    main_rank = os.environ.get("RANK", "0") == "0"
    prompts, records = iter(given) if given is not None else _asked(), []
    # Rank 0 reads the prompts; the others hear of each, and of the end.
    while (prompt := broadcast_object(next(prompts, None) if main_rank else None, model.mesh.tp_group)) is not None:
        ids: list[int] = []
        answer, began = "", time.perf_counter()
        text = generation_prompt(template, prompt)
        for piece in generate_text(model, text, args.max_new_tokens, sampling, stop=args.stop, seed=args.seed, on_ids=ids.append):
            answer += piece
            if main_rank:
                print(piece, end="", flush=True)
        if main_rank:
            print()
            rate = len(ids) / (time.perf_counter() - began)
            print(f"[{len(ids)} tokens, {rate:.1f} tokens/s]", file=sys.stderr)
        records.append({"prompt": prompt, "answer": answer, "ids": ids})
    if args.output and main_rank:
        with atomic_file(args.output) as partial:
            partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    close_mesh()
    return 0
