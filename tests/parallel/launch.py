"""Run a function in several processes, as torchrun would, and collect what each returns.

The processes are forked from a server that has imported torch and pyalpaca once: importing them takes longer than most tests.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

_PRELOADED = ["torch", "torch.distributed", "torch.distributed.tensor", "pyalpaca.train.loop", "pyalpaca.demo.make_model"]


def _worker(rank: int, function: Callable[..., Any], world: int, port: int, folder: str, arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    from pyalpaca.parallel import close_mesh

    close_mesh()


def launch(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[function(*arguments) of rank 0, of rank 1, ...]; the function must be importable from a module."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(_PRELOADED)
        mp.start_processes(_worker, (function, world, port, folder, arguments), nprocs=world, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]
