"""`pyalpaca train` and `python -m pyalpaca.train`: the command line of a training run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from pyalpaca.train.config import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; the last line on stdout is the summary as one JSON object."""
    config = parse(argv)
    from pyalpaca.parallel import close_mesh
    from pyalpaca.train.loop import train

    result = train(config)
    close_mesh()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result))
    return 0
