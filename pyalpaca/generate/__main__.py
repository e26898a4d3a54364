"""torchrun --nproc_per_node N -m pyalpaca.generate ..."""

from pyalpaca.cli import run
from pyalpaca.generate.run import main

run(main)
