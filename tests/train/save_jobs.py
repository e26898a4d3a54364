"""What is disturbed in test_run_faults.py: a checkpoint written, by the thread of `Saver`, over the one before it.

`python save_jobs.py {kill,full} FOLDER STRIDE` prints what `crash_driver.sweep` returns as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from crash_driver import Job, sweep


def job() -> Job:
    """The old state is a run saved at step 2, of which one checkpoint is kept; the work is the save at step 4."""
    import torch
    from train_makers import MODEL

    from pyalpaca.checkpoint import digest, memory_reader, open_checkpoint
    from pyalpaca.model import flatten, init, parameters
    from pyalpaca.parallel import Mesh
    from pyalpaca.train import TrainConfig
    from pyalpaca.train.prepare import plan, start
    from pyalpaca.train.saving import Saver, restore, tidy

    model = replace(MODEL, num_layers=1)
    mesh = Mesh(torch.device("cpu"))

    def save(run: Path, step: int) -> None:
        config = TrainConfig(output=str(run), keep=1)
        setup = plan(model, config, mesh)
        fresh = flatten(init(parameters(model)))
        reader = memory_reader(model, {p.name: fresh[p.path] * step for p in parameters(model)}, None)
        if run.is_dir():
            tidy(run)
        with Saver(run, setup) as saver:
            saver.save(replace(start(config, setup, reader), step=step))

    def read(folder: Path) -> str:
        setup = plan(model, TrainConfig(output=str(folder / "run")), mesh)
        step = restore(folder / "run", setup, torch.float32).step
        return f"{step} {digest(open_checkpoint(folder / 'run'))}"

    return Job(lambda folder: save(folder / "run", 2), lambda folder: save(folder / "run", 4), read)


if __name__ == "__main__":
    print(json.dumps(sweep(job(), Path(sys.argv[2]), sys.argv[1], int(sys.argv[3]))))
