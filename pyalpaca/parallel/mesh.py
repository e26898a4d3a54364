"""The mesh: which rank of which axis this process is, and the process groups of its axes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist

from pyalpaca.parallel.host import start_group

_BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}


@dataclass(frozen=True)
class Mesh:
    """Sizes and ranks of the tensor (tp), context (cp), data (dp) and pipeline (pp) axes; tp varies fastest, pp slowest.

    Replicas are the ranks that hold the same weights and see other tokens: those of the context and the data axis together.
    The groups are None where they are of one rank.
    """

    device: torch.device
    tp: int = 1
    dp: int = 1
    pp: int = 1
    rank: int = 0
    tp_group: dist.ProcessGroup | None = None
    replica_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    cp: int = 1
    cp_group: dist.ProcessGroup | None = None

    @property
    def world(self) -> int:
        return self.tp * self.replicas * self.pp

    @property
    def replicas(self) -> int:
        return self.cp * self.dp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def replica_rank(self) -> int:
        return self.rank // self.tp % self.replicas

    @property
    def cp_rank(self) -> int:
        return self.replica_rank % self.cp

    @property
    def dp_rank(self) -> int:
        return self.replica_rank // self.cp

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp * self.replicas)

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    def stage_neighbour(self, step: int) -> int:
        """The global rank of the same tp, cp and dp rank, `step` pipeline stages further; after the last comes the first."""
        return (self.rank + step * self.tp * self.replicas) % self.world


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


def init_mesh(tp: int = 1, pp: int = 1, timeout_minutes: float = 30.0, cp: int = 1) -> Mesh:
    """The mesh of this process under torchrun; what tp x cp x pp leaves of the world is data parallel. Alone: one device.

    ValueError if the world is not a multiple of tp x cp x pp.
    """
    world, model = int(os.environ.get("WORLD_SIZE", "1")), tp * cp * pp
    if world % model:
        context = f"context-parallel {cp} x " * (cp > 1)
        raise ValueError(
            f"{world} process{'es' * (world > 1)} can't form tensor-parallel {tp} x {context}pipeline-parallel {pp}: "
            f"start a multiple of {model} of them, e.g. with torchrun --nproc_per_node {model}"
        )
    device = find_device()
    if world == 1:
        return Mesh(device)
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        start_group(_BACKENDS[device.type], timeout_minutes)
    mesh = Mesh(device, tp, world // model, pp, dist.get_rank(), cp=cp)

    def group(size: int, key: Callable[[Mesh], tuple[int, ...]]) -> dist.ProcessGroup | None:
        """This rank's group of the ranks that share `key`; every process makes every group, in the same order."""
        if size == 1:
            return None
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(world):
            members.setdefault(key(replace(mesh, rank=rank)), []).append(rank)
        groups = {k: dist.new_group(ranks, timeout=timeout) for k, ranks in sorted(members.items())}
        return groups[key(mesh)]

    return replace(
        mesh,
        tp_group=group(mesh.tp, lambda m: (m.replica_rank, m.pp_rank)),
        replica_group=group(mesh.replicas, lambda m: (m.tp_rank, m.pp_rank)),
        pp_group=group(mesh.pp, lambda m: (m.tp_rank, m.replica_rank)),
        cp_group=group(mesh.cp, lambda m: (m.tp_rank, m.dp_rank, m.pp_rank)),
    )


def close_mesh() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
