"""A conversion is a plan: files whose every byte has its place, and steps that each read some tensors and fill some places.

So any layout is written by one engine, tensor by tensor, by several threads, and what a plan needs is known before it starts.
"""

from __future__ import annotations

import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyalpaca.checkpoint.canonical import Reader, total_bytes
from pyalpaca.checkpoint.container.layout import FileLayout
from pyalpaca.checkpoint.container.tensor_file import dtype_name, raw_bytes
from pyalpaca.checkpoint.mixing import refuse_mixing
from pyalpaca.files import atomic_file, atomic_folder, free_space, human_size, preallocate, require_space

Made = tuple[str, str, Tensor]
"""(file name, key in it, tensor to store there)."""

Checksums = Mapping[str, Mapping[str, int]]
"""{file name: {key: crc32 of the tensor's bytes}}."""

_MAX_WORKERS = 8
_IN_FLIGHT = 400_000_000
"""Bytes of tensors being worked on at once; a step that is larger by itself runs alone."""


@dataclass(frozen=True)
class Step:
    """Canonical tensors that are read whole, and what is made of them for the files: {name: tensor} -> made tensors."""

    names: tuple[str, ...]
    make: Callable[[Mapping[str, Tensor]], Iterable[Made]]


def as_it_is(file: str, name: str) -> Step:
    """The step that stores a canonical tensor under its own name."""
    return Step((name,), lambda read: [(file, name, read[name])])


@dataclass(frozen=True)
class Plan:
    """How a model is written.

    layout: of what is written. files: with tensors. steps: fill each place of each file just once.
    small: names of the files that `finish` writes into the folder once the tensors are there.
    single: the output is one file, not a folder; nothing is written beside it.
    """

    layout: str
    reader: Reader
    files: list[FileLayout]
    steps: list[Step]
    small: tuple[str, ...] = ()
    finish: Callable[[Path, Checksums], None] = lambda folder, checksums: None
    single: bool = False

    @property
    def size(self) -> int:
        """Bytes of the tensor files."""
        return sum(file.size for file in self.files)


def execute(plan: Plan, out: str | Path) -> None:
    """Write what is planned to `out`: all of it or nothing.

    Raises ValueError, before anything is written, if the disk is too small, or if `out` is the folder that is being read or
    holds another model.
    """
    check(plan, out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the parallelism is over steps
    bar = tqdm(total=plan.size, unit="B", unit_scale=True, desc="writing", disable=None)
    try:
        with atomic_file(out) if plan.single else atomic_folder(out) as target, bar:
            with ExitStack() as files:
                paths = {layout.name: target if plan.single else target / layout.name for layout in plan.files}
                writers = {file.name: files.enter_context(_Writer(file, paths[file.name])) for file in plan.files}
                _run(plan, writers, bar)
                for writer in writers.values():
                    writer.seal()
            plan.finish(target, {name: writer.checksums for name, writer in writers.items()})
    finally:
        torch.set_num_threads(threads)


def write_file(layout: FileLayout, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file whose tensors are in memory, and flush it to the disk."""
    with _Writer(layout, path) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
        writer.seal()
        os.fsync(writer.descriptor)


def check(plan: Plan, out: str | Path) -> None:
    """All that can be known to fail before anything is written; ValueError says what."""
    path = Path(out)
    if path.exists() and path.resolve() == plan.reader.path.resolve():
        raise ValueError(f"{path}: is what is being read; choose another output")
    if plan.single and path.suffix != Path(plan.files[0].name).suffix:
        raise ValueError(f"{path}: is to be a file in the layout {plan.layout}, expected a name like {plan.files[0].name}")
    if not plan.single:
        refuse_mixing(path, {*(file.name for file in plan.files), *plan.small})
    require_space(path, plan.size)


def describe(plan: Plan, out: str | Path) -> str:
    """What `execute` would do: files, tensors, sizes, and the memory and disk space that it needs."""
    check(plan, out)
    reader = plan.reader
    dtypes = ", ".join(sorted({dtype_name(dtype) for dtype in reader.dtypes.values()}))
    lines = [
        f"read   {reader.path} ({reader.layout}): {len(reader.names)} tensors, {dtypes}, "
        f"vocabulary {reader.config.vocab_size}, {human_size(total_bytes(reader))}",
        f"write  {out} ({plan.layout}):",
    ]
    lines += [
        f"       {Path(out).name if plan.single else file.name}  {human_size(file.size)}, {len(file.specs)} tensors"
        for file in plan.files
    ]
    lines += [f"       {name}" for name in plan.small]
    largest = max((_step_bytes(plan.reader, step) for step in plan.steps), default=0)
    memory = max(largest, min(_IN_FLIGHT, _workers() * largest)) * 2  # as they are read, and what is made of them
    lines.append(
        f"disk   {human_size(plan.size)} needed, {human_size(free_space(Path(out)))} free; "
        f"memory about {human_size(memory)} for tensors"
    )
    return "\n".join(lines)


def _step_bytes(reader: Reader, step: Step) -> int:
    return total_bytes(reader, step.names)


def _workers() -> int:
    return min(os.cpu_count() or 1, _MAX_WORKERS)


def _run(plan: Plan, writers: Mapping[str, _Writer], bar: Any) -> None:
    """Run all steps, as many at once as there are workers and room for their tensors."""

    def work(step: Step) -> int:
        written = 0
        for file, key, tensor in step.make({name: plan.reader.read(name) for name in step.names}):
            written += writers[file].write(key, tensor)
        return written

    workers, running = _workers(), dict[Future[int], int]()
    with _interrupts_noted() as interrupts, ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
        try:
            for step in plan.steps:
                size = _step_bytes(plan.reader, step)
                while running and (len(running) >= workers or sum(running.values()) + size > _IN_FLIGHT):
                    _collect(running, bar, interrupts)
                running[pool.submit(work, step)] = size
            while running:
                _collect(running, bar, interrupts)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def _interrupts_noted() -> Iterator[list[int]]:
    """Ctrl-C only notes itself in the list: an exception amid the locks of a thread pool could leave one of them held."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # the only one that may ask for signals
        yield noted
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _collect(running: dict[Future[int], int], bar: Any, interrupts: list[int]) -> None:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    if interrupts:
        raise KeyboardInterrupt
    for future in done:
        del running[future]
        bar.update(future.result())


class _Writer:
    """One file being filled, from several threads."""

    def __init__(self, layout: FileLayout, path: Path) -> None:
        self.layout = layout
        self.path = path
        self.checksums: dict[str, int] = {}
        self._turn = threading.Lock()  # the kernel lets one thread at a time write to a file, and has the others spin

    def __enter__(self) -> _Writer:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        preallocate(self.descriptor, self.layout.size)
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.descriptor)

    def write(self, key: str, tensor: Tensor) -> int:
        """Put a tensor in its place; returns its size in bytes."""
        spec = self.layout.specs[key]
        if (tuple(tensor.shape), tensor.dtype) != spec:
            raise AssertionError(f"{key}: {tuple(tensor.shape)} {tensor.dtype} was announced as {spec}")
        assert key not in self.checksums, f"{key} was given twice"
        data = raw_bytes(tensor)
        self.checksums[key] = zlib.crc32(data) if self.layout.needs_checksums else 0
        with self._turn:
            _write_at(self.descriptor, data, self.layout.places[key])
        return len(data)

    def seal(self) -> None:
        """Write what is not tensor data, once all tensors are there."""
        missing = self.layout.specs.keys() - self.checksums.keys()
        assert not missing, f"{self.path}: announced but not given: {sorted(missing)[:3]}"
        for offset, data in self.layout.seal(self.checksums):
            _write_at(self.descriptor, memoryview(data), offset)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
