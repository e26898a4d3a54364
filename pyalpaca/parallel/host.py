"""What processes tell each other beside the steps: on the CPU, in a group of its own, so that a thread may do it meanwhile."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def host_group(timeout_minutes: float = 30.0) -> dist.ProcessGroup | None:
    """A gloo group of all processes, for one thread's use; None if there is one process. Every process must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))


def agree(values: Sequence[int], group: dist.ProcessGroup | None) -> list[int]:
    """The largest of the values that the processes of the group give in each place, on each of them."""
    if group is None:
        return list(values)
    box = torch.tensor(values)
    dist.all_reduce(box, dist.ReduceOp.MAX, group)
    return [int(value) for value in box]


def tell(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """The values of all processes in the order of their ranks, on each of them; any object that can be pickled."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def start_group(backend: str, timeout_minutes: float) -> None:
    """Initialise torch.distributed from the environment that torchrun, or another launcher, has set.

    torchrun keeps one store for all its attempts (torch 2.13), so that a process that it starts again may find the addresses of
    processes that are dead. So ours first find out, see `meet`, who is there, and use the store under a name of their own.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = launcher_store()
    name = meet(store, rank, world, timeout.total_seconds())
    under: Any = dist.PrefixStore  # type: ignore[attr-defined]  # as for TCPStore below
    dist.init_process_group(backend, store=under(name, store), rank=rank, world_size=world, timeout=timeout)


def meet(store: Any, rank: int, world: int, timeout_seconds: float) -> str:
    """A name that the processes of all ranks agree on and that none has used before, whatever dead ones have left in the store.

    Each says hello by a new word; rank 0 lists the words until every rank has confirmed a list that has its own.
    RuntimeError if some rank does not come within the time.
    """
    me, end = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    hello, confirmed = ([f"pyalpaca/{what}/{r}" for r in range(world)] for what in ("hello", "confirmed"))
    table, ready = "pyalpaca/table", "pyalpaca/ready"
    store.set(hello[rank], me)

    def read(keys: Sequence[str]) -> list[str] | None:
        return [value.decode() for value in store.multi_get(list(keys))] if store.check(list(keys)) else None

    while time.monotonic() < end:
        if rank == 0 and (words := read(hello)) is not None:
            store.set(table, ",".join(words))
        if (listed := read([table])) is not None and listed[0].split(",")[rank : rank + 1] == [me]:
            store.set(confirmed[rank], listed[0])
            if rank == 0 and read(confirmed) == listed * world:
                store.set(ready, listed[0])
            if read([ready]) == listed:
                return f"pyalpaca/{hashlib.sha256(listed[0].encode()).hexdigest()}"
        time.sleep(0.02)
    raise RuntimeError(f"rank {rank}: timed out, not all of the {world} processes have started; see what the others say")


def launcher_store() -> Any:
    """A connection of one's own to the Store through which the processes found each other; None where there is none.

    torchrun keeps it when it starts the processes again.
    """
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    connect: Any = dist.TCPStore  # type: ignore[attr-defined]  # a compiled class that its module does not announce
    return connect(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))


def restarts() -> int:
    """How many times torchrun has started this process's group again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def remember(key: str) -> None:
    """Let the launcher remember a word, for processes that it starts again; without torchrun nobody would ask."""
    if "TORCHELASTIC_RESTART_COUNT" in os.environ and (store := launcher_store()) is not None:
        store.set(key, "1")


def remembered(key: str) -> bool:
    """Whether a process that this launcher has started before has let it remember the word."""
    if not restarts():
        return False
    store = launcher_store()
    return store is not None and bool(store.check([key]))
