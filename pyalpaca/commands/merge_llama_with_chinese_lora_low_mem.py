"""The original low-memory merge script's command line: merge_llama_with_chinese_lora_low_mem.py."""

from __future__ import annotations

from collections.abc import Sequence

from pyalpaca.commands.merge_llama_with_chinese_lora import merge_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raises ValueError or OSError for bad input."""
    return merge_command(argv, script="merge_llama_with_chinese_lora_low_mem.py", output_dir="./merged_model")
