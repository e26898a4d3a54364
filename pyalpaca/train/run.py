"""`pyalpaca train` and `python -m pyalpaca.train`: the command line of a training run."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence

from pyalpaca.train.flags import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; the last line on stdout is the summary as one JSON object.

    Exit status 143 if a SIGTERM, 130 if a SIGINT has ended the run after a last step and a checkpoint; 3 if another rank is lost.
    """
    config = parse(argv)
    from pyalpaca.ops import reuse_memory
    from pyalpaca.parallel import PeerLostError, close_mesh
    from pyalpaca.train.loop import train

    reuse_memory()
    try:
        result = train(config)
    except PeerLostError:  # said already
        return 3
    close_mesh()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result))
    if stopped := result.get("signal", 0):
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(stopped).name
            print(f"{config.output}: {name} came; the running step was finished and saved, go on with --resume", file=sys.stderr)
        return 128 + int(stopped)
    return 0
