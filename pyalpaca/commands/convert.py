"""`pyalpaca convert`: any checkpoint layout to any other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pyalpaca.commands.writing import adapter_list, add_writing, carry_out

LAYOUTS = ("hf", "meta", "megatron", "deepspeed", "native", "gguf")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raises ValueError or OSError for bad input."""
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint to another layout. The source's layout is recognised: Meta, Hugging Face, Megatron "
        "(AscendSpeed), DeepSpeed, llama.cpp (GGUF), or a run of our own.",
        epilog="example: pyalpaca convert merged-tp4-pp2 merged-hf --to hf",
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint folder of any layout, or a .gguf file")
    parser.add_argument("out", metavar="DST", help="folder to write; gguf: file")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout to write")
    parser.add_argument(
        "--lora", type=adapter_list, default=[], metavar="A[,B]", help="adapter folders to merge on the way, in order"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16", "q8_0", "q4_0"),
        help="cast all tensors (default: as they are); the last two quantize and are for gguf",
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="V", help="real vocabulary of a source that does not say it (Megatron pads it)"
    )
    parser.add_argument(
        "--weights", choices=("safetensors", "bin"), default="safetensors", help="hf: kind of file (default: safetensors)"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="hf: size at which a new file is begun (default: 5GB)"
    )
    parser.add_argument("--num-shards", type=int, metavar="N", help="meta: shards (default: as Meta published that size, else 1)")
    parser.add_argument("--tp", type=int, default=1, help="megatron, deepspeed: tensor-parallel ranks (default: 1)")
    parser.add_argument("--pp", type=int, default=1, help="megatron: pipeline stages (default: 1)")
    parser.add_argument(
        "--dialect", choices=("A", "B"), default="A", help="megatron: names of A AscendSpeed or B Megatron (default: A)"
    )
    parser.add_argument("--merge-mlp", action="store_true", help="megatron: gate and up as one tensor, mlp.proj")
    parser.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="megatron: times tp, padding (128)"
    )
    parser.add_argument(
        "--vocab-padding",
        choices=("copy", "zero"),
        default="copy",
        help="megatron: padding, copies of the last rows (default) or 0",
    )
    add_writing(parser)
    args = parser.parse_args(argv)

    from pyalpaca.checkpoint import Output, open_checkpoint, plan_conversion

    output = Output(
        layout=args.to,
        dtype=args.dtype,
        tp=args.tp,
        pp=args.pp,
        dialect=args.dialect,
        merge_mlp=args.merge_mlp,
        divisible_by=args.make_vocab_size_divisible_by,
        padding=args.vocab_padding,
        weights=args.weights,
        max_shard_size=args.max_shard_size,
        num_shards=args.num_shards,
        container=args.container,
    )
    planned = plan_conversion(open_checkpoint(args.source, lora=args.lora, vocab_size=args.vocab_size), output)
    return carry_out(planned, args.out, args.dry_run, f"converted {args.source} ({planned.reader.layout})")
