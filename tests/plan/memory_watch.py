"""How many bytes of tensors are alive at every operator: a storage counts from the operator that makes it to its death."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryWatch(TorchDispatchMode):
    """Within it, `alive` is the bytes of the storages that operators have made and that are still alive, `peak` their most.

    known: tensors made before. Views and results written in place are the storage that they are of. Memory that an operator
    takes and gives back before it returns is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._live: dict[int, weakref.ref[Any]] = {}
        self._sizes: dict[int, int] = {}
        self.alive = self.peak = 0
        for tensor in known:
            self._see(tensor)
        self.before = self.alive

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._live and self._live[key]() is storage:
            return

        def gone(_: object, key: int = key) -> None:
            self.alive -= self._sizes.pop(key)
            del self._live[key]

        self._live[key] = weakref.ref(storage, gone)
        self._sizes[key] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return found
