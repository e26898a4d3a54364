"""Pipeline schedules as data: what each stage does in which order; and a simulator that plays them without a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

SCHEDULES = ("1f1b", "interleaved", "zb-h1")


class Action(NamedTuple):
    """One unit of work of a stage on one micro-batch, in one of the stage's chunks of layers.

    forward; backward, whole or split in two: input (the gradient of what came in, which the stage before waits for) and
    weight (the gradients of the weights, which nobody waits for).
    """

    kind: Literal["forward", "backward", "input", "weight"]
    micro_batch: int
    chunk: int = 0


def one_f_one_b(stage: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """The 1F1B schedule of one stage (Narayanan et al. 2021, fig. 4): warm up, alternate, drain."""
    warmup = min(num_stages - stage - 1, num_micro_batches)
    actions = [Action("forward", i) for i in range(warmup)]
    for i in range(num_micro_batches - warmup):
        actions += [Action("forward", warmup + i), Action("backward", i)]
    return actions + [Action("backward", i) for i in range(num_micro_batches - warmup, num_micro_batches)]


def interleaved(stage: int, num_stages: int, num_micro_batches: int, num_chunks: int) -> list[Action]:
    """1F1B over virtual stages (Narayanan et al. 2021, section 2.2): chunk c of a stage is virtual stage c * stages + stage.

    ValueError if the micro-batches can't go round in groups of num_stages.
    """
    if num_micro_batches % num_stages:
        raise ValueError(
            f"{num_micro_batches} micro-batches can't be interleaved over {num_stages} pipeline stages; "
            f"choose a global batch size that gives each data-parallel rank a multiple of {num_stages} of them"
        )

    def place(k: int) -> tuple[int, int]:
        """(micro-batch, chunk) of the k-th forward: num_stages micro-batches through each chunk in turn."""
        round_, at = divmod(k, num_stages * num_chunks)
        return round_ * num_stages + at % num_stages, at // num_stages

    total = num_micro_batches * num_chunks
    forward = [Action("forward", *place(k)) for k in range(total)]
    backward = [Action("backward", i, num_chunks - 1 - chunk) for i, chunk in map(place, range(total))]
    warmup = min((num_stages - stage - 1) * 2 + (num_chunks - 1) * num_stages, total)
    actions = forward[:warmup]
    for k in range(total - warmup):
        actions += [forward[warmup + k], backward[k]]
    return actions + backward[total - warmup :]


def zb_h1(stage: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """Zero bubble, handcrafted, within the activations of 1F1B (Qi et al. 2023, fig. 2 and section 2.1).

    1F1B with the backward split: the weights' part of a stage comes `stage` micro-batches after the inputs', so that every
    stage holds as much as the first one of 1F1B, and what is put off fills the time in which the pipeline drains.
    """
    actions: list[Action] = []
    for kind, i, _ in one_f_one_b(stage, num_stages, num_micro_batches):
        if kind == "forward":
            actions.append(Action("forward", i))
            continue
        actions.append(Action("input", i))
        if i >= stage:
            actions.append(Action("weight", i - stage))
    return actions + [Action("weight", i) for i in range(max(num_micro_batches - stage, 0), num_micro_batches)]


def pipeline_schedule(name: str, stage: int, num_stages: int, num_micro_batches: int, num_chunks: int = 1) -> list[Action]:
    """The actions of one stage by the schedule's name, one of SCHEDULES; num_chunks: virtual stages on each stage.

    ValueError if the schedule can't be had with these numbers.
    """
    if name not in SCHEDULES:
        raise ValueError(f"there is no pipeline schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    if (name == "interleaved") != (num_chunks > 1):
        raise ValueError(
            f"the schedule {name} has {num_chunks} virtual stages on a stage; interleaved wants 2 or more, the others 1"
        )
    if name != "1f1b" and num_stages == 1:
        raise ValueError(f"the schedule {name} is for a pipeline, and there is 1 stage; choose 1f1b or more stages")
    if name == "interleaved":
        return interleaved(stage, num_stages, num_micro_batches, num_chunks)
    return (zb_h1 if name == "zb-h1" else one_f_one_b)(stage, num_stages, num_micro_batches)


class Simulation(NamedTuple):
    """makespan in the unit of the costs (forward passes of a chunk, if none are given); bubble: idle share of it, mean over
    stages; in_flight: most activations a stage held, in chunks, each from its forward to its backward, or weight, action."""

    makespan: float
    bubble: float
    in_flight: list[int]


def simulate(
    schedules: Sequence[Sequence[Action]], forward: float | Sequence[float] = 1.0, backward: float | Sequence[float] = 2.0
) -> Simulation:
    """Play one list of actions a stage, each as early as its inputs allow; the halves of a split backward cost the same.

    forward, backward: what they cost in each chunk, everywhere or on each stage.
    ValueError if the stages wait for each other forever.
    """
    num_stages = len(schedules)
    num_chunks = 1 + max((a.chunk for actions in schedules for a in actions), default=0)
    forwards = [forward] * num_stages if isinstance(forward, int | float) else forward
    backwards = [backward] * num_stages if isinstance(backward, int | float) else backward
    costs = [{"forward": f, "backward": b, "input": b / 2, "weight": b / 2} for f, b in zip(forwards, backwards, strict=True)]
    # When virtual stage v has finished the forward, or the gradient of its input, of a micro-batch.
    outputs: dict[tuple[int, int], float] = {}
    gradients: dict[tuple[int, int], float] = {}
    clock, position = [0.0] * num_stages, [0] * num_stages
    held, in_flight = [0] * num_stages, [0] * num_stages

    def ready(virtual: int, action: Action) -> float | None:
        """When what the action needs of this and the neighbouring stages is there; None: not yet known."""
        here = virtual, action.micro_batch
        if action.kind == "forward":
            return outputs.get((virtual - 1, action.micro_batch)) if virtual else 0.0
        if action.kind == "weight":
            return gradients.get(here)
        if virtual == num_stages * num_chunks - 1 or here not in outputs:
            return outputs.get(here)
        return gradients.get((virtual + 1, action.micro_batch))

    while any(position[s] < len(schedules[s]) for s in range(num_stages)):
        moved = False
        for s in range(num_stages):
            if position[s] == len(schedules[s]):
                continue
            action = schedules[s][position[s]]
            virtual = action.chunk * num_stages + s
            if (start := ready(virtual, action)) is None:
                continue
            clock[s] = max(clock[s], start) + costs[s][action.kind]
            if action.kind == "forward":
                outputs[virtual, action.micro_batch] = clock[s]
                held[s] += 1
            if action.kind in ("backward", "input"):
                gradients[virtual, action.micro_batch] = clock[s]
            if action.kind in ("backward", "weight"):
                held[s] -= 1
            in_flight[s] = max(in_flight[s], held[s])
            position[s] += 1
            moved = True
        if not moved:
            waiting = {s: schedules[s][position[s]] for s in range(num_stages) if position[s] < len(schedules[s])}
            raise ValueError(f"the schedule deadlocks: each of these waits for another: {waiting}")
    makespan = max(clock)
    work = sum(cost[a.kind] for cost, actions in zip(costs, schedules, strict=True) for a in actions)
    return Simulation(makespan, 1 - work / (num_stages * makespan), in_flight)
