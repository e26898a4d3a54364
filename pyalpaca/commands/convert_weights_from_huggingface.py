"""AscendSpeed's command line: convert_weights_from_huggingface.py, Hugging Face to model-parallel weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyalpaca.commands.writing import add_writing, carry_out

if TYPE_CHECKING:
    from pyalpaca.model import LlamaConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raises ValueError or OSError for bad input."""
    parser = argparse.ArgumentParser(
        description="Cut a Hugging Face model for tensor and pipeline parallelism, in the layout of AscendSpeed and Megatron.",
        epilog="example: python tools/ckpt_convert/llama/convert_weights_from_huggingface.py --input-model-dir merged "
        "--output-model-dir merged-tp4-pp2 --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --type 13B",
    )
    parser.add_argument("--input-model-dir", required=True, help="Hugging Face folder (or any layout that pyalpaca reads)")
    parser.add_argument("--output-model-dir", required=True, help="folder to write")
    parser.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="times tp: pads the vocabulary (128)"
    )
    parser.add_argument(
        "--tensor-model-parallel-size", type=int, default=1, metavar="TP", help="tensor-parallel ranks (default: 1)"
    )
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="PP", help="pipeline stages (default: 1)")
    parser.add_argument(
        "--type", help="7B, 13B, 30B, 33B or 65B: checked against the model's config (default: whatever that says)"
    )
    parser.add_argument(
        "--deepspeed", action="store_true", help="write mp_rank_NN_model_states.pt as DeepSpeed loads them (pp 1)"
    )
    parser.add_argument("--merge-mlp", action="store_true", help="write gate and up as one tensor, mlp.proj")
    parser.add_argument("--num_layers", "--num-layers", type=int, help="expected number of layers, instead of the type's")
    parser.add_argument("--num_heads", "--num-heads", type=int, help="expected number of heads, instead of the type's")
    parser.add_argument("--hidden_size", "--hidden-size", type=int, help="expected width, instead of the type's")
    parser.add_argument("--num_kv_heads", "--num-kv-heads", type=int, help="expected number of key/value heads")
    parser.add_argument(
        "--dialect", choices=("A", "B"), default="A", help="spelling of the names: A AscendSpeed, B Megatron (default: A)"
    )
    parser.add_argument(
        "--vocab-padding", choices=("copy", "zero"), default="copy", help="rows of padding: copies of the last (default) or zeros"
    )
    add_writing(parser)
    args = parser.parse_args(argv)

    from pyalpaca.checkpoint import Output, open_checkpoint, plan_conversion

    reader = open_checkpoint(args.input_model_dir)
    asked = {key: getattr(args, key) for key in ("num_layers", "hidden_size", "num_heads", "num_kv_heads")}
    _check_type(args.input_model_dir, reader.config, args.type, asked)
    output = Output(
        "deepspeed" if args.deepspeed else "megatron",
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        dialect=args.dialect,
        merge_mlp=args.merge_mlp,
        divisible_by=args.make_vocab_size_divisible_by,
        padding=args.vocab_padding,
        container=args.container,
    )
    done = f"converted {args.input_model_dir} for tp {output.tp} pp {output.pp}, dialect {args.dialect}"
    return carry_out(plan_conversion(reader, output), args.output_model_dir, args.dry_run, done)


def _check_type(source: str, config: LlamaConfig, name: str | None, asked: dict[str, int | None]) -> None:
    """ValueError if the model is not what --type and the flags that override it say."""
    from pyalpaca.checkpoint import SIZES, size_by_name

    size = size_by_name(name) if name else None
    if name and size is None:
        raise ValueError(f"--type {name} is not one of {', '.join(SIZES)}, 30B; leave it out to take what config.json says")
    if size is not None:
        table = {"num_layers": size.num_layers, "hidden_size": size.hidden_size, "num_heads": size.num_heads}
        asked = {key: asked[key] if asked[key] is not None else table.get(key) for key in asked}
    for key, value in asked.items():
        has = getattr(config, key)
        if value is not None and value != has:
            raise ValueError(
                f"{source}: the model has {key} {has}, {f'--type {name}' if size else f'--{key}'} asks for {value}; correct it"
            )
