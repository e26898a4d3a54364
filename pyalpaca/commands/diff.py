"""`pyalpaca diff`: how far apart two checkpoints are, tensor by tensor."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from pyalpaca.commands.writing import adapter_list


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raises ValueError or OSError for bad input."""
    parser = argparse.ArgumentParser(
        description="Compare two checkpoints in any two layouts, merged views included, tensor by tensor: the largest and the "
        "mean absolute difference, other shapes, types and names. As numbers: 0 equals -0, and NaN equals NaN in the same "
        "place. The last line is one JSON object; a difference that is not finite, or of nothing, is null there. "
        "Status 0 if all is equal, 1 if not, 2 for bad input.",
        epilog="example: pyalpaca diff llama-7b-hf merged --lora-a chinese-llama-plus-lora-7b,chinese-alpaca-plus-lora-7b",
    )
    parser.add_argument("a", metavar="A", help="checkpoint folder of any layout")
    parser.add_argument("b", metavar="B", help="another, of any layout")
    for side in "ab":
        upper = side.upper()
        text = f"adapter folders, merged into {upper} in this order"
        parser.add_argument(f"--lora-{side}", type=adapter_list, default=[], metavar="A[,B]", help=text)
        text = f"real vocabulary of {upper}, if its folder does not say it (Megatron pads it)"
        parser.add_argument(f"--vocab-size-{side}", type=int, metavar="V", help=text)
    parser.add_argument("--all", action="store_true", help="print the tensors that are equal, too")
    args = parser.parse_args(argv)

    from pyalpaca.checkpoint import diff, diff_summary, open_checkpoint

    a = open_checkpoint(args.a, lora=args.lora_a, vocab_size=args.vocab_size_a)
    b = open_checkpoint(args.b, lora=args.lora_b, vocab_size=args.vocab_size_b)
    found = []
    for entry in diff(a, b):
        found.append(entry)
        if args.all or not entry.equal:
            numbers = f"max {entry.max:.3e}  mean {entry.mean:.3e}" if entry.compared else f"{'max -':<13}  {'mean -':<14}"
            print(f"{numbers}  {entry.name}: {entry.reason or 'equal'}")
    total = diff_summary(found)
    same = total["equal"] == total["tensors"]
    counts = f"{total['equal']} equal, {total['different']} different, {total['missing']} in one of the two only"
    print(f"{total['tensors']} tensors: {counts}")
    print(json.dumps(total))
    return 0 if same else 1
