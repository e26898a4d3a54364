"""transformers' command line for Meta's weights: convert_llama_weights_to_hf.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pyalpaca.commands.writing import add_writing, carry_out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raises ValueError or OSError for bad input."""
    parser = argparse.ArgumentParser(
        description="Convert LLaMA weights in Meta's format (consolidated.NN.pth, params.json) to a Hugging Face folder.",
        epilog="example: python tools/convert_llama_weights_to_hf.py --input_dir llama --model_size 7B --output_dir llama-7b-hf",
    )
    parser.add_argument("--input_dir", required=True, help="folder with the weights, or with a folder named after --model_size")
    parser.add_argument("--model_size", help="7B, 13B, 30B, 33B, 65B or the name of any folder in --input_dir")
    parser.add_argument("--output_dir", required=True, help="Hugging Face folder to write")
    parser.add_argument(
        "--safe_serialization",
        type=_boolean,
        nargs="?",
        const=True,
        default=True,
        metavar="{true,false}",
        help="write safetensors (the default) or pytorch_model.bin files",
    )
    parser.add_argument("--max_shard_size", default="5GB", help="size at which a new weight file is begun (default: 5GB)")
    add_writing(parser)
    args = parser.parse_args(argv)

    from pyalpaca.checkpoint import Output, open_meta, plan_conversion

    weights = "safetensors" if args.safe_serialization else "bin"
    output = Output("hf", weights=weights, max_shard_size=args.max_shard_size, container=args.container)
    planned = plan_conversion(open_meta(_source(Path(args.input_dir), args.model_size)), output)
    return carry_out(planned, args.output_dir, args.dry_run, f"converted {planned.reader.path} to {weights}")


def _source(root: Path, size: str | None) -> Path:
    """{input_dir}/{model_size} if there is such a folder (30B and 33B are one size), else input_dir."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: not found, expected the folder with Meta's weights; check --input_dir")
    for name in (size, {"33B": "30B", "30B": "33B"}.get(size or "")):
        if name and (root / name).is_dir():
            return root / name
    if size and not (root / "params.json").is_file():
        raise FileNotFoundError(
            f"{root / size}: not found, and {root} holds no params.json itself; check --input_dir and --model_size"
        )
    return root


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"
