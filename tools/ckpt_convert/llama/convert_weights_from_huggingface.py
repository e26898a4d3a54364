"""What users know as AscendSpeed's convert_weights_from_huggingface.py: weights cut for model parallelism."""

from pyalpaca.cli import run
from pyalpaca.commands.convert_weights_from_huggingface import main

if __name__ == "__main__":
    run(main)
