"""`pyalpaca digest`: one content digest for the same weights in every layout."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pyalpaca.commands.writing import adapter_list


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raises ValueError or OSError for bad input."""
    parser = argparse.ArgumentParser(
        description="Print the sha256 of a model's content: names, shapes, types and values of its tensors. It is the same "
        "for the same weights in every layout, cut in any way, and for a merged folder and the merge that makes it.",
        epilog="example: pyalpaca digest llama-7b-hf --lora chinese-llama-plus-lora-7b,chinese-alpaca-plus-lora-7b",
    )
    parser.add_argument("path", metavar="PATH", help="checkpoint folder of any layout")
    parser.add_argument("--lora", type=adapter_list, default=[], metavar="A[,B]", help="adapter folders, merged in this order")
    parser.add_argument(
        "--vocab-size", type=int, metavar="V", help="real vocabulary of a folder that does not say it (Megatron pads it)"
    )
    parser.add_argument("--tensors", action="store_true", help="before it, one line for each tensor: sha256, name, type, shape")
    args = parser.parse_args(argv)

    from pyalpaca.checkpoint import combine, open_checkpoint, tensor_digests

    lines = []
    for _, line in tensor_digests(open_checkpoint(args.path, lora=args.lora, vocab_size=args.vocab_size)):
        lines.append(line)
        if args.tensors:
            print(line)
    print(combine(lines))
    return 0
