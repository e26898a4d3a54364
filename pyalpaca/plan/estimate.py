"""The plan of a training: memory, bytes moved, time and utilisation of every stage.

A step takes what each limit of the device takes at the same share of it: matrix products at the share of its arithmetic peak,
everything else at that of its memory's rate, collectives at that of its links; nothing is taken to be hidden behind something
else. That one share is fitted to the published runs (see `EFFICIENCY`) and is the same for every layout and device.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyalpaca.parallel import Traffic, simulate
from pyalpaca.plan.activations import numbers
from pyalpaca.plan.devices import Device
from pyalpaca.plan.job import Job
from pyalpaca.plan.memory import Memory, in_flight, memory, numbers_to_update
from pyalpaca.plan.traffic import seconds, traffic
from pyalpaca.plan.work import Work, backward_work, computed_twice, ends_work, forward_work, teraflops, update_work

EFFICIENCY = 0.74
"""Share of each of a device's limits that a run reaches: that for which the published steps of the 13B on 8 Ascend 910B2 and on
8 A100 (tp1 pp1 dp8, ZeRO-2, batch 256, sequence 256) are met best."""


@dataclass(frozen=True)
class Stage:
    """One pipeline stage. layers: how many; parameters, trainable: on one device; micro_batches: whose activations it holds at
    most; forward, backward: seconds of one micro-batch; rest: seconds of a step for gradients and optimizer."""

    layers: int
    parameters: int
    trainable: int
    micro_batches: float
    memory: Memory
    traffic: Traffic
    forward: float
    backward: float
    rest: float


@dataclass(frozen=True)
class Plan:
    """seconds: of a step; bubble: the share of the pipeline's time in which stages wait; hfu, mfu: shares of the peak, by the
    published formula (recomputation counted, not counted); fits: whether every stage has enough memory."""

    job: Job
    device: Device
    efficiency: float
    stages: list[Stage]
    seconds: float
    bubble: float
    tflops: float
    model_tflops: float

    @property
    def hfu(self) -> float:
        return self.tflops / self.device.tflops

    @property
    def mfu(self) -> float:
        return self.model_tflops / self.device.tflops

    @property
    def memory(self) -> int:
        """Bytes of the stage that needs most."""
        return max(stage.memory.total for stage in self.stages)

    @property
    def room(self) -> float:
        """Bytes that a stage may take."""
        return self.device.memory - self.device.reserved

    @property
    def fits(self) -> bool:
        return self.memory <= self.room

    @property
    def samples_per_second(self) -> float:
        """Of one device."""
        return self.job.global_batch / self.seconds / self.job.devices

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.samples_per_second * self.job.seq


def make_plan(job: Job, device: Device, efficiency: float = EFFICIENCY) -> Plan:
    """The plan of a job on such devices; efficiency: see `EFFICIENCY`. ValueError if it is not a share."""
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency is {efficiency}, expected a share of the device's limits above 0 and at most 1")
    stages = [_stage(job, device, efficiency, s, held) for s, held in enumerate(in_flight(job))]
    # What a chunk does is taken to be an even part of what its stage does.
    forward = [stage.forward / job.chunks for stage in stages]
    backward = [stage.backward / job.chunks for stage in stages]
    played = simulate([job.actions(s) for s in range(job.pp)], forward, backward)
    taken = played.makespan + max(stage.rest for stage in stages)
    twice = computed_twice(job.model.num_layers, job.recompute, job.recompute_every)
    hardware, own = (teraflops(f, job.global_batch, job.seq, job.model, taken, job.devices) for f in (3 + twice, 3))
    return Plan(job, device, efficiency, stages, taken, played.bubble, hardware, own)


def _stage(job: Job, device: Device, efficiency: float, stage: int, held: float) -> Stage:
    def time(work: Work) -> float:
        return (work.flops / (device.tflops * 1e12) + work.bytes / device.memory_rate) / efficiency

    parameters = job.held(stage)
    learning = [p for p in parameters if job.learns(p)]
    layers, moved = job.blocks(stage), traffic(job, stage)
    links = seconds(moved, job, device)
    forward, backward = ends_work(job, stage)
    how = [job.recomputed(layer) for layer in layers]
    forward += forward_work(job).times(len(layers))
    for h in set(how):
        backward += backward_work(job, h).times(how.count(h))
    # Tensor-parallel collectives, rings and messages between stages belong to the micro-batches, a third to the forward pass.
    waiting = (links["tp"] + links["cp"] + links["pp"]) / job.micro_batches / efficiency
    learned = numbers(learning, job)
    update = update_work(sum(numbers_to_update(p, job) for p in learning), learned, job)
    return Stage(
        len(layers),
        numbers(parameters, job),
        learned,
        held,
        memory(job, stage, held),
        moved,
        time(forward) + waiting / 3,
        time(backward) + waiting * 2 / 3,
        time(update) + links["dp"] / efficiency,
    )
