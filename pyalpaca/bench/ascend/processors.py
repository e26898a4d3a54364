"""The processors of the 910B family and the rates that the timeline plays against: what is published, and what is assumed.

Published (the Ascend C documentation's table of vector instructions, product data): cores, clock, HBM, L2, elements a cycle of
each vector instruction, 16 x 16 x 16 products a cycle, L1 to L0A and L0B. Nobody publishes what an instruction costs before
its first result, nor what one core's path to memory carries; those are assumptions, chosen so that copies of 16 KB come within
some percent of the full bandwidth, as the documentation says they do. Not modelled: conflicts of banks, the length of queues,
refresh of HBM, unaligned addresses, the launch itself.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Processor:
    """One of the family: cube cores (each with two vector cores), GHz, bytes of L2, bytes a second of HBM and of L2."""

    name: str
    cube_cores: int
    ghz: float
    l2_bytes: int
    hbm: float = 1.6e12
    l2: float = 7e12

    @property
    def vector_cores(self) -> int:
        return 2 * self.cube_cores

    @property
    def flops(self) -> float:
        """fp16 operations a second of the cube cores: 16 x 16 x 16 products of two operations a cycle."""
        return self.cube_cores * 8192 * self.ghz * 1e9


PROCESSORS = {
    "B1": Processor("910B1", 24, 1.85, 192 << 20),
    "B2": Processor("910B2", 24, 1.8, 192 << 20),
    "B3": Processor("910B3", 20, 1.8, 192 << 20),
    "B4": Processor("910B4", 20, 1.5, 96 << 20),
}


@dataclass(frozen=True)
class Assumed:
    """What is not published: bytes a cycle of one core's path, and cycles."""

    vector_path: float = 64.0
    cube_path: float = 128.0
    issue: float = 8.0
    vector_start: float = 14.0
    cube_start: float = 16.0
    copy_start: float = 40.0
    copy_latency: float = 400.0
    scalar_miss: float = 300.0


ASSUMED = Assumed()


def costlier(assumed: Assumed, factor: float) -> Assumed:
    """The same with every cost `factor` times as high, paths as much narrower: how much rests on what is assumed."""
    costs = {field.name: getattr(assumed, field.name) * factor for field in fields(assumed)}
    return Assumed(**costs | {"vector_path": assumed.vector_path / factor, "cube_path": assumed.cube_path / factor})


def each_costlier(assumed: Assumed, factor: float) -> dict[str, Assumed]:
    """By the name of a cost, the same with that one alone `factor` times as high."""
    all_costlier = costlier(assumed, factor)
    return {field.name: replace(assumed, **{field.name: getattr(all_costlier, field.name)}) for field in fields(assumed)}


def rates(processor: Processor, assumed: Assumed = ASSUMED) -> list[float]:
    """The numbers in the order of csrc/emu/src/timeline.h; bytes per cycle, cycles, bytes."""
    cycles = processor.ghz * 1e9
    return [
        processor.hbm / cycles,
        processor.l2 / cycles,
        assumed.vector_path,
        assumed.cube_path,
        float(processor.l2_bytes),
        assumed.issue,
        assumed.vector_start,
        assumed.cube_start,
        assumed.copy_start,
        assumed.copy_latency,
        assumed.scalar_miss,
    ]
