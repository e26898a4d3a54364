"""A launch played by the emulation: how long, how busy each pipe is, what moved; and the entries of one core."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

from pyalpaca.bench.ascend.processors import ASSUMED, Assumed, Processor, rates

PIPES = ("S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX")  # in the order of the emulation
KINDS = {"AIV": 0, "MIX": 5}  # vector cores alone; a cube core with two vector cores
_VECTOR_PIPES, _CUBE_PIPES = (0, 1, 4, 5), (0, 2, 3, 4, 6)


@dataclass(frozen=True)
class Reserved:
    """A tensor of so many bytes that no value is read from."""

    bytes: int


@dataclass(frozen=True)
class Filled:
    """A tensor of int64 numbers that the scalar pipe reads."""

    values: tuple[int, ...]


Argument = Reserved | Filled | int | float | None


@dataclass(frozen=True)
class Launch:
    """A kernel by its name, on so many blocks; arguments by name, None a null pointer."""

    kernel: str
    kind: str
    blocks: int
    arguments: Mapping[str, Argument]


@dataclass(frozen=True)
class Entry:
    """One instruction: its pipe, start and end in microseconds, its name and its line in the kernel."""

    pipe: str
    start: float
    end: float
    name: str
    line: int


@dataclass(frozen=True)
class Core:
    """A core of a launch: AIC or AIV, when it ended (seconds), its entries if they were kept."""

    kind: str
    seconds: float
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Timeline:
    """Seconds, the busy share of each pipe (mean over the cores that have it; cube cores' as AIC.MTE2), bytes and flops."""

    seconds: float
    busy: Mapping[str, float]
    hbm_bytes: float
    l2_bytes: float
    cube_flops: float
    cores: tuple[Core, ...]


def play(
    library: ctypes.CDLL, launch: Launch, processor: Processor, assumed: Assumed = ASSUMED, *, entries: bool = False
) -> Timeline:
    """Record and play a launch; `entries` keeps those of the AI core that ends last. RuntimeError with the fault's text."""
    library.emu_reset()
    words = [_word(library, name, value) for name, value in launch.arguments.items()]
    packed = (ctypes.c_uint64 * len(words))(*words)
    given = rates(processor, assumed)
    summary = (ctypes.c_double * (5 + 9 * 3 * launch.blocks))()
    text = ctypes.create_string_buffer(2000)
    failed = library.emu_model(
        launch.kernel.encode(),
        KINDS[launch.kind],
        launch.blocks,
        packed,
        len(words),
        (ctypes.c_double * len(given))(*given),
        summary,
        text,
        ctypes.c_uint64(2000),
    )
    if failed:
        raise RuntimeError(text.value.decode(errors="replace"))
    makespan, hbm_bytes, l2_bytes, products, count = summary[:5]
    hertz = processor.ghz * 1e9
    rows = [summary[5 + 9 * i : 14 + 9 * i] for i in range(int(count))]
    shares: dict[str, list[float]] = {}
    for vector, _, *busy in rows:
        for pipe in _VECTOR_PIPES if vector else _CUBE_PIPES:
            name = PIPES[pipe] if vector or launch.kind == "AIV" or pipe in (2, 3, 6) else f"AIC.{PIPES[pipe]}"
            shares.setdefault(name, []).append(busy[pipe] / makespan if makespan else 0.0)
    group = 3 if launch.kind == "MIX" else 1
    last = max(range(len(rows)), key=lambda i: rows[i][1]) // group * group
    kept = range(last, last + group) if entries else range(0)
    cores = tuple(
        Core("AIV" if vector else "AIC", end / hertz, _entries(library, i, hertz) if i in kept else ())
        for i, (vector, end, *_) in enumerate(rows)
    )
    return Timeline(
        makespan / hertz,
        {name: sum(values) / len(values) for name, values in shares.items()},
        hbm_bytes,
        l2_bytes,
        products * 8192,
        cores,
    )


def _word(library: ctypes.CDLL, name: str, value: Argument) -> int:
    if isinstance(value, Reserved):
        return int(library.emu_reserve(name.encode(), ctypes.c_uint64(value.bytes)))
    if isinstance(value, Filled):
        held = (ctypes.c_int64 * len(value.values))(*value.values)
        return int(library.emu_tensor(name.encode(), held, ctypes.c_uint64(ctypes.sizeof(held)), 1))
    if isinstance(value, float):
        return int(ctypes.c_uint32.from_buffer(ctypes.c_float(value)).value)
    return int(value or 0) & 0xFFFFFFFFFFFFFFFF


def _entries(library: ctypes.CDLL, core: int, hertz: float) -> tuple[Entry, ...]:
    count = int(library.emu_log(core, ctypes.c_uint64(0), None, None, None))
    times, places = (ctypes.c_double * (2 * count))(), (ctypes.c_int32 * (2 * count))()
    names = (ctypes.c_char_p * count)()
    library.emu_log(core, ctypes.c_uint64(count), times, places, names)
    return tuple(
        Entry(
            PIPES[places[2 * i]],
            times[2 * i] / hertz * 1e6,
            times[2 * i + 1] / hertz * 1e6,
            (names[i] or b"").decode(),
            places[2 * i + 1],
        )
        for i in range(count)
    )
