"""What users know as transformers' convert_llama_weights_to_hf.py: Meta's weights to a Hugging Face folder."""

from pyalpaca.cli import run
from pyalpaca.commands.convert_llama_weights_to_hf import main

if __name__ == "__main__":
    run(main)
