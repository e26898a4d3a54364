"""merge_tokenizers: LLaMA's tokenizer and a Chinese SentencePiece model to the tokenizer of Chinese-LLaMA."""

from __future__ import annotations

import argparse
from pathlib import Path

_EXAMPLE = """example:
  python tools/merge_tokenizer/merge_tokenizers.py --llama_tokenizer_dir llama-7b-hf --chinese_sp_model_file chinese_sp.model
  writes merged_tokenizer_sp/chinese_llama.model and merged_tokenizer_hf/ (49,953 pieces; 49,954 with --add_pad)
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Add to a LLaMA tokenizer every piece of a Chinese SentencePiece model that it lacks.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--llama_tokenizer_dir", type=Path, required=True, help="folder with LLaMA's tokenizer.model, or the file itself")
    add("--chinese_sp_model_file", type=Path, required=True, help="the Chinese SentencePiece model")
    add("--output_dir", type=Path, default=Path(), help="folder for the two folders that are written (default: here)")
    add("--add_pad", action="store_true", help="append the token [PAD], as Chinese-Alpaca has it")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. ValueError or OSError for what a user did."""
    args = _parser().parse_args(argv)
    from pyalpaca.data import load_tokenizer, merge_tokenizers, write_tokenizer_folder

    base: Path = args.llama_tokenizer_dir
    if base.is_dir():
        base = base / "tokenizer.model"
    before = load_tokenizer(base)
    out: Path = args.output_dir
    model = out / "merged_tokenizer_sp" / "chinese_llama.model"
    count = merge_tokenizers(base, args.chinese_sp_model_file, model, args.add_pad)
    folder = out / "merged_tokenizer_hf"
    write_tokenizer_folder(model, folder)
    print(f"{model}: {count:,} pieces, {count - before.vocab_size:,} of them new")
    print(f"{folder}: the same for Hugging Face")
    example = "人工智能是计算机科学、心理学、哲学等学科融合的交叉学科。"
    after = load_tokenizer(folder)
    print(f"{example} {len(before.encode(example))} ids before, {len(after.encode(example))} after")
    return 0
