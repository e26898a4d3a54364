"""torchrun --nproc_per_node N -m pyalpaca.train ..."""

from pyalpaca.cli import run
from pyalpaca.train.run import main

run(main)
