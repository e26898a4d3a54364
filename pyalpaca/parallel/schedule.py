"""Pipeline schedules as data: what each stage does in which order; and a simulator that plays them without a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple


class Action(NamedTuple):
    """One unit of work of a stage on one micro-batch."""

    kind: Literal["forward", "backward"]
    micro_batch: int


def one_f_one_b(stage: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """The 1F1B schedule of one stage (Narayanan et al. 2021, fig. 4): warm up, alternate, drain."""
    warmup = min(num_stages - stage - 1, num_micro_batches)
    actions = [Action("forward", i) for i in range(warmup)]
    for i in range(num_micro_batches - warmup):
        actions += [Action("forward", warmup + i), Action("backward", i)]
    return actions + [Action("backward", i) for i in range(num_micro_batches - warmup, num_micro_batches)]


class Simulation(NamedTuple):
    """makespan in forward passes; bubble: idle share of it, mean over stages; in_flight: most activations a stage held."""

    makespan: float
    bubble: float
    in_flight: list[int]


def simulate(schedules: Sequence[Sequence[Action]], forward: float = 1.0, backward: float = 2.0) -> Simulation:
    """Play one list of actions a stage, each as early as its inputs allow; ValueError if they wait for each other forever."""
    num_stages = len(schedules)
    done: dict[tuple[int, Action], float] = {}
    clock, position = [0.0] * num_stages, [0] * num_stages
    held, in_flight = [0] * num_stages, [0] * num_stages
    while any(position[s] < len(schedules[s]) for s in range(num_stages)):
        moved = False
        for s in range(num_stages):
            if position[s] == len(schedules[s]):
                continue
            action = schedules[s][position[s]]
            source = s - 1 if action.kind == "forward" else s + 1
            ready = 0.0 if not 0 <= source < num_stages else done.get((source, action))
            if ready is None or (action.kind == "backward" and (s, Action("forward", action.micro_batch)) not in done):
                continue
            clock[s] = max(clock[s], ready) + (forward if action.kind == "forward" else backward)
            done[s, action] = clock[s]
            held[s] += 1 if action.kind == "forward" else -1
            in_flight[s] = max(in_flight[s], held[s])
            position[s] += 1
            moved = True
        if not moved:
            waiting = {s: schedules[s][position[s]] for s in range(num_stages) if position[s] < len(schedules[s])}
            raise ValueError(f"the schedule deadlocks: each of these waits for another: {waiting}")
    makespan = max(clock)
    work = sum(forward if a.kind == "forward" else backward for actions in schedules for a in actions)
    return Simulation(makespan, 1 - work / (num_stages * makespan), in_flight)
