"""What Chinese-LLaMA-Alpaca's users know as merge_tokenizers.py: LLaMA's tokenizer with a Chinese vocabulary."""

from pyalpaca.cli import run
from pyalpaca.commands.merge_tokenizers import main

if __name__ == "__main__":
    run(main)
