"""The fastest layouts that fit: every cut of the devices, micro-batch, recomputation and ZeRO stage that the runtime has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pyalpaca.plan.devices import Device
from pyalpaca.plan.estimate import EFFICIENCY, Plan, make_plan
from pyalpaca.plan.job import Job

_RECOMPUTE = (("none", 1), ("selective", 1), ("full", 2), ("full", 1))
_MICRO_BATCHES = (1, 2, 4, 8, 16)


def search(job: Job, device: Device, efficiency: float = EFFICIENCY) -> list[Plan]:
    """The plans that fit of all layouts of the job's number of devices, the fastest first; of equal ones that with less memory.

    What the job says of model, batch, sequence, dtype, LoRA and sequence parallelism stays (the last where tp is above 1).
    """
    found = [make_plan(candidate, device, efficiency) for candidate in _candidates(job, device)]
    return sorted((plan for plan in found if plan.fits), key=lambda plan: (round(plan.seconds, 4), plan.memory))


def _candidates(job: Job, device: Device) -> Iterator[Job]:
    for tp, cp, pp, dp in _cuts(job.devices, device.per_node):
        for micro_batch in _MICRO_BATCHES:
            for zero in (0, 1, 2, 3) if tp * cp * pp == 1 and dp > 1 else (0, 1) if cp * dp > 1 else (0,):
                for recompute, every in _RECOMPUTE:
                    layout: dict[str, Any] = {
                        **{"tp": tp, "cp": cp, "pp": pp, "dp": dp, "micro_batch": micro_batch, "zero": zero, "layers": ()},
                        **{"recompute": recompute, "recompute_every": every},
                        **({} if pp > 1 else {"schedule": "1f1b", "chunks": 1}),
                        "sequence_parallel": job.sequence_parallel and tp > 1,
                    }
                    try:
                        yield replace(job, **layout)
                    except ValueError:  # what heads, layers or batch do not allow
                        continue


def _cuts(devices: int, per_node: int) -> Iterator[tuple[int, int, int, int]]:
    """(tp, cp, pp, dp) whose product is the devices; tensor parallelism stays within a node, whose links it needs most."""
    for tp in range(1, min(devices, per_node) + 1):
        if devices % tp:
            continue
        left = devices // tp
        for pp in _divisors(left):
            for cp in _divisors(left // pp):
                yield tp, cp, pp, left // pp // cp


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
