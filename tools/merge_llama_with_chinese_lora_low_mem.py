"""What users know as Chinese-LLaMA-Alpaca's merge_llama_with_chinese_lora_low_mem.py: adapters into a base model."""

from pyalpaca.cli import run
from pyalpaca.commands.merge_llama_with_chinese_lora_low_mem import main

if __name__ == "__main__":
    run(main)
