"""The mesh: which rank of which axis this process is, and the process groups of its axes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist

from pyalpaca.parallel.host import start_group

_BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}


@dataclass(frozen=True)
class Mesh:
    """Sizes and ranks of the tensor (tp), data (dp) and pipeline (pp) axes; tp varies fastest, pp slowest.

    The groups are None where an axis has size 1.
    """

    device: torch.device
    tp: int = 1
    dp: int = 1
    pp: int = 1
    rank: int = 0
    tp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None

    @property
    def world(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp % self.dp

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp * self.dp)

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    def stage_neighbour(self, step: int) -> int:
        """The global rank of the same tp and dp rank, `step` pipeline stages further; after the last comes the first."""
        return (self.rank + step * self.tp * self.dp) % self.world


def find_device() -> torch.device:
    """The accelerator of this process (its LOCAL_RANK-th NPU or GPU), else the CPU."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if find_spec("torch_npu") is not None and os.environ.get("ASCEND_HOME_PATH"):
        import torch_npu

        if torch_npu.npu.is_available():
            torch_npu.npu.set_device(local)
            return torch.device("npu", local)
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device("cpu")


def init_mesh(tp: int = 1, pp: int = 1, timeout_minutes: float = 30.0) -> Mesh:
    """The mesh of this process under torchrun; what tp x pp leaves of the world is data parallel. Alone: one device.

    ValueError if the world is not a multiple of tp x pp.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % (tp * pp):
        raise ValueError(
            f"{world} process{'es' * (world > 1)} can't form tensor-parallel {tp} x pipeline-parallel {pp}: "
            f"start a multiple of {tp * pp} of them, e.g. with torchrun --nproc_per_node {tp * pp}"
        )
    device = find_device()
    if world == 1:
        return Mesh(device)
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        start_group(_BACKENDS[device.type], timeout_minutes)
    mesh = Mesh(device, tp, world // (tp * pp), pp, dist.get_rank())

    def group(size: int, key: Callable[[Mesh], tuple[int, ...]]) -> dist.ProcessGroup | None:
        """This rank's group of the ranks that share `key`; every process makes every group, in the same order."""
        if size == 1:
            return None
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(world):
            members.setdefault(key(Mesh(device, mesh.tp, mesh.dp, mesh.pp, rank)), []).append(rank)
        groups = {k: dist.new_group(ranks, timeout=timeout) for k, ranks in sorted(members.items())}
        return groups[key(mesh)]

    return Mesh(
        device,
        mesh.tp,
        mesh.dp,
        mesh.pp,
        mesh.rank,
        tp_group=group(mesh.tp, lambda m: (m.dp_rank, m.pp_rank)),
        dp_group=group(mesh.dp, lambda m: (m.tp_rank, m.pp_rank)),
        pp_group=group(mesh.pp, lambda m: (m.tp_rank, m.dp_rank)),
    )


def close_mesh() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
