"""One piece of work in a fresh process: how long it took, and how much memory of its own it held at most.

The parent reads /proc/PID/status of the child every 10 ms. Memory of its own is RssAnon + RssShmem: what the process has
allocated or written, without the pages of files that it has mapped, which the system takes back whenever it needs them.
That is VmHWM less the file pages, taken at the moment when it is largest.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyalpaca

INTERVAL = 0.01
"""Seconds between two looks at a process."""

_FIELDS = ("VmHWM", "RssAnon", "RssFile", "RssShmem")


@dataclass(frozen=True)
class Memory:
    """Bytes of a process's memory.

    own: the largest RssAnon + RssShmem seen. baseline: the same once everything was imported, before the work.
    file: the largest RssFile seen. resident: VmHWM, the kernel's own high-water mark of all three, file pages included.
    looks: how many times the process was looked at.
    """

    own: int
    baseline: int
    file: int
    resident: int
    looks: int


@dataclass(frozen=True)
class Run:
    """One run in a fresh process.

    seconds: the work alone, after the imports. process_seconds: from the start of the process until the work was done.
    cpu_seconds: of all threads during the work. memory: None where there is no /proc. result: what the work returned.
    """

    seconds: float
    process_seconds: float
    cpu_seconds: float
    memory: Memory | None
    result: Any


def parse_status(text: str) -> dict[str, int]:
    """{field: bytes} of the memory fields of a /proc/PID/status; empty for a process that has ended."""
    lines = (line.split() for line in text.splitlines())
    return {words[0][:-1]: int(words[1]) << 10 for words in lines if words and words[0][:-1] in _FIELDS}


def status(process: int | str = "self") -> dict[str, int]:
    """The memory fields of a process, in bytes; empty if it has ended or there is no /proc."""
    try:
        return parse_status(Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace"))
    except OSError:
        return {}


def own_bytes(fields: Mapping[str, int]) -> int:
    """Memory of a process's own: what it allocated or wrote, without the pages of mapped files."""
    return fields.get("RssAnon", 0) + fields.get("RssShmem", 0)


def watch(process: subprocess.Popen[Any], interval: float = INTERVAL) -> tuple[int, int, int]:
    """Look at a child until it has ended: (largest memory of its own, largest RssFile, number of looks)."""
    own = file = looks = 0
    while process.poll() is None:
        if fields := status(process.pid):
            own, file, looks = max(own, own_bytes(fields)), max(file, fields.get("RssFile", 0)), looks + 1
        time.sleep(interval)
    return own, file, looks


def run_fresh(target: str, arguments: Mapping[str, Any]) -> Run:
    """Run `target` in a process of its own.

    target: `module:function`. The function gets the arguments, imports all that it needs and returns the work as a function
    without arguments. Arguments and the work's result are what JSON can say. ValueError with the child's last line if it
    fails; all it said goes to stderr.
    """
    command = [sys.executable, "-m", "pyalpaca.bench.process", target, json.dumps(dict(arguments))]
    paths = [str(Path(pyalpaca.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}) as child:
            try:
                own, file, looks = watch(child)
            except BaseException:
                child.kill()
                raise
        for stream in (out, err):
            stream.seek(0)
        if child.returncode != 0:
            said = err.read().decode(errors="replace").strip()
            print(said, file=sys.stderr)
            last = said.splitlines()[-1] if said else f"status {child.returncode} and no message"
            raise ValueError(f"{target}: the process that was to be measured ended with {last}")
        report = json.loads(out.read().splitlines()[-1])
    ready, done = report["ready"], report["done"]
    memory = None
    if ready and done:
        own = max(own, own_bytes(ready), own_bytes(done))
        memory = Memory(own, own_bytes(ready), file, done["VmHWM"], looks)
    # perf_counter is one clock for all processes of a machine since it was started.
    return Run(report["end"] - report["start"], report["end"] - began, report["cpu"], memory, report["result"])


def main() -> None:
    """The fresh process: prepare, work, and report in one line."""
    module, name = sys.argv[1].split(":")
    prepare: Callable[..., Callable[[], object]] = getattr(importlib.import_module(module), name)
    work = prepare(**json.loads(sys.argv[2]))
    ready, cpu, start = status(), time.process_time(), time.perf_counter()
    result = work()
    end, cpu, done = time.perf_counter(), time.process_time() - cpu, status()
    print(json.dumps({"start": start, "end": end, "cpu": cpu, "ready": ready, "done": done, "result": result}), flush=True)


if __name__ == "__main__":
    main()
