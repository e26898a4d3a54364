"""`pyalpaca merge`: merge LoRA adapters into a base model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pyalpaca.commands.writing import adapter_list, add_writing, carry_out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raises ValueError or OSError for bad input."""
    parser = argparse.ArgumentParser(
        description="Merge LoRA adapters into a base model of any layout, bit for bit as the original scripts do (fp16, "
        "rounded after each adapter). The output has the vocabulary and the tokenizer of the last adapter.",
        epilog="example: pyalpaca merge llama-7b-hf --lora chinese-llama-plus-lora-7b,chinese-alpaca-plus-lora-7b --out merged",
    )
    parser.add_argument("base", help="base model, a checkpoint folder of any layout")
    parser.add_argument("--lora", type=adapter_list, required=True, metavar="A[,B]", help="adapter folders, merged in this order")
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument("--to", choices=("hf", "meta"), default="hf", help="output layout (default: hf)")
    parser.add_argument("--num-shards", type=int, help="shards of the meta layout (default: as Meta published that size, else 1)")
    add_writing(parser)
    args = parser.parse_args(argv)

    from pyalpaca.checkpoint import Output, plan_merge

    output = Output(args.to, num_shards=args.num_shards, container=args.container)
    planned = plan_merge(args.base, args.lora, output)
    return carry_out(planned, args.out, args.dry_run, f"merged {', '.join(args.lora)} into {args.base}")
