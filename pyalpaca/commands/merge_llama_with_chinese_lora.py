"""The original merge script's command line: merge_llama_with_chinese_lora.py, and what it shares with its low-memory sister."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pyalpaca.commands.writing import adapter_list, add_writing, carry_out

_LAYOUTS = {"pth": "meta", "huggingface": "hf"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raises ValueError or OSError for bad input."""
    return merge_command(argv, script="merge_llama_with_chinese_lora.py", output_dir="./")


def merge_command(argv: Sequence[str] | None, script: str, output_dir: str) -> int:
    """Both scripts' command line; they differ in the default of --output_dir. Either streams tensor by tensor here."""
    parser = argparse.ArgumentParser(
        description="Merge Chinese-LLaMA or Chinese-Alpaca LoRA adapters into a LLaMA base model in Hugging Face format. The "
        "order of the adapters matters: LLaMA-Plus first, then Alpaca-Plus.",
        epilog=f"example: python tools/{script} --base_model llama-7b-hf "
        f"--lora_model chinese-llama-plus-lora-7b,chinese-alpaca-plus-lora-7b --output_type pth --output_dir merged",
    )
    parser.add_argument("--base_model", required=True, help="base model folder (any layout that pyalpaca reads)")
    parser.add_argument(
        "--lora_model", type=adapter_list, required=True, metavar="A[,B]", help="adapter folders, merged in this order"
    )
    parser.add_argument("--output_type", choices=tuple(_LAYOUTS), default="pth", help="output format (default: pth)")
    parser.add_argument("--output_dir", default=output_dir, help=f"output folder (default: {output_dir})")
    parser.add_argument("--offload_dir", help="accepted for compatibility; nothing needs to be offloaded")
    parser.add_argument("--verbose", action="store_true", help="say for each tensor which adapter replaces it or adds to it")
    parser.add_argument("--num_shards", type=int, help="shards of the pth format (default: 7B 1, 13B 2, 33B 4, 65B 8, others 1)")
    add_writing(parser)
    args = parser.parse_args(argv)

    from pyalpaca.checkpoint import Output, describe_merge, plan_merge

    output = Output(_LAYOUTS[args.output_type], num_shards=args.num_shards, container=args.container)
    planned = plan_merge(args.base_model, args.lora_model, output)
    if args.verbose:
        print("\n".join(describe_merge(planned.reader.names, args.lora_model)))
    done = f"merged {', '.join(args.lora_model)} into {args.base_model}"
    status = carry_out(planned, args.output_dir, args.dry_run, done)
    print("Done.")
    return status
