"""`pyalpaca extract`: a LoRA adapter out of a trained checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from pyalpaca.commands.writing import adapter_list


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raises ValueError or OSError for bad input."""
    parser = argparse.ArgumentParser(
        description="Write a LoRA adapter that PEFT reads and that turns a base model into a trained one. A run that trained "
        "LoRA factors (--lora-r) gives just these. Any other checkpoint, of any layout, is compared with its base: projections "
        "that differ get the best factors of a rank, embeddings, head and norms that differ are stored whole. The last line is "
        "one JSON object.",
        epilog="examples: pyalpaca extract runs/lora adapter; pyalpaca extract runs/full adapter --base llama-7b-hf --rank 64",
    )
    parser.add_argument("trained", metavar="TRAINED", help="trained model: a run, or a checkpoint folder of any layout")
    parser.add_argument("out", metavar="OUT", help="adapter folder to write")
    parser.add_argument(
        "--base", help="model that it was trained from, of any layout; a run with factors is only compared with it"
    )
    parser.add_argument("--lora", type=adapter_list, default=[], metavar="A[,B]", help="adapters merged into BASE, in this order")
    parser.add_argument(
        "--rank", type=int, metavar="R", help="fit factors of this rank, even to a run with factors of its own (default: 64)"
    )
    parser.add_argument("--alpha", type=float, help="lora_alpha of fitted factors (default: the rank)")
    parser.add_argument("--targets", type=adapter_list, metavar="M[,N]", help="projections to fit (default: all seven)")
    parser.add_argument("--weights", choices=("safetensors", "bin"), default="safetensors", help="kind of file (safetensors)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of what is stored (default: float32 if fitted, else as it is)",
    )
    parser.add_argument("--vocab-size", type=int, metavar="V", help="real vocabulary of a TRAINED that Megatron padded")
    parser.add_argument("--base-vocab-size", type=int, metavar="V", help="the same of BASE")
    args = parser.parse_args(argv)
    if args.lora and not args.base:
        raise ValueError("--lora names adapters to merge into the base; give --base too")

    from pyalpaca.checkpoint.extract import extract

    found = extract(
        args.trained,
        args.out,
        base=args.base,
        lora=args.lora,
        rank=args.rank,
        alpha=args.alpha,
        targets=args.targets,
        weights=args.weights,
        dtype=args.dtype,
        vocab_size=args.vocab_size,
        base_vocab_size=args.base_vocab_size,
    )
    for change in found.changes:
        if change.whole:
            print(f"{'whole':<30}{change.name}")
        elif found.source == "run":
            print(f"{'as it is':<30}{change.name}")
        else:
            print(f"{f'kept {change.energy:.4%}  error {change.error:.1e}':<30}{change.name}")
    summary = found.summary()
    whole = f", {len(summary['whole'])} tensors whole" if summary["whole"] else ""
    print(f"{args.out}: factors of rank {found.r} for {summary['factors']} tensors{whole}, {found.unchanged} unchanged")
    print(json.dumps({"out": args.out, **summary}))
    return 0
