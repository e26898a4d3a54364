"""What AscendSpeed's users know as preprocess_data.py: records to a prepared data set."""

from pyalpaca.cli import run
from pyalpaca.commands.preprocess_data import main

if __name__ == "__main__":
    run(main)
