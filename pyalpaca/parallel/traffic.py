"""How many bytes this process moves: the collectives that reach torch.distributed are counted where torch dispatches them.

So whatever part of the program calls them is seen, and where nothing is counted nothing is paid for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyalpaca.parallel.mesh import Mesh

Traffic = dict[tuple[str, str], int]
"""{(axis, collective): bytes}: the axis is tp, cp, dp (all replicas of the weights), pp, or other; the collective all_reduce,
all_gather, reduce_scatter, send or broadcast. The bytes are those of the whole tensor: summed, gathered, scattered, sent."""

# Which argument of an operator of torch.distributed holds the whole tensor.
_COLLECTIVES = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "send": ("send", 0),
    "broadcast_": ("broadcast", 0),
}


@contextmanager
def count_traffic(mesh: Mesh) -> Iterator[Traffic]:
    """Yield a record that holds, as the context goes on, what this process has moved in it. A message counts where it is sent."""
    moved: Traffic = {}
    with _Counter(mesh, moved):
        yield moved


class _Counter(TorchDispatchMode):
    def __init__(self, mesh: Mesh, moved: Traffic) -> None:
        super().__init__()
        groups = {"tp": mesh.tp_group, "cp": mesh.cp_group, "dp": mesh.replica_group, "pp": mesh.pp_group}
        self._axes = {group.group_name: axis for axis, group in groups.items() if group is not None}
        self._moved = moved

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            if name in _COLLECTIVES:
                collective, where = _COLLECTIVES[name]
                key = self._axis(args), collective
                self._moved[key] = self._moved.get(key, 0) + _bytes(args[where])
        call: Callable[..., Any] = func
        return call(*args, **(kwargs or {}))

    def _axis(self, args: Sequence[Any]) -> str:
        """The axis whose group is among the arguments."""
        for argument in args:
            if isinstance(argument, torch.ScriptObject) and str(argument._type()).endswith(".ProcessGroup"):
                return self._axes.get(dist.ProcessGroup.unbox(argument).group_name, "other")
        return "other"


def _bytes(tensors: Any) -> int:
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(_bytes(t) for t in tensors)
