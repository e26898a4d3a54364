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

_GO = "go\n"
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

    seconds: the work alone. process_seconds: with the start of the process and its imports.
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


def run_fresh(target: str, arguments: Mapping[str, Any], before: Callable[[], object] = lambda: None) -> Run:
    """Run `target` in a process of its own.

    target: `module:function`. The function gets the arguments, imports all that it needs and returns the work as a function
    without arguments. Arguments and the work's result are what JSON can say. before: called here, between imports and work.
    ValueError with the child's last line if it fails; all it said goes to stderr.
    """
    command = [sys.executable, "-m", "pyalpaca.bench.process", target, json.dumps(dict(arguments))]
    paths = [str(Path(pyalpaca.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        with subprocess.Popen(command, stderr=err, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, **pipes) as child:
            try:
                ready = child.stdout.readline() if child.stdout else ""
                imports = time.perf_counter() - began
                if ready and child.stdin:
                    before()
                    child.stdin.write(_GO)
                    child.stdin.close()
                own, file, looks = watch(child)
                said = child.stdout.read() if child.stdout else ""
            except BaseException:
                child.kill()
                raise
        if child.returncode != 0:
            err.seek(0)
            complaint = err.read().decode(errors="replace").strip()
            print(complaint, file=sys.stderr)
            last = complaint.splitlines()[-1] if complaint else f"status {child.returncode} and no message"
            raise ValueError(f"{target}: the process that was to be measured ended with {last}")
    report = json.loads(said)
    memory = None
    if report["start_status"] and report["end_status"]:
        baseline, end = own_bytes(report["start_status"]), own_bytes(report["end_status"])
        memory = Memory(max(own, baseline, end), baseline, file, report["end_status"]["VmHWM"], looks)
    return Run(report["seconds"], imports + report["seconds"], report["cpu_seconds"], memory, report["result"])


def main() -> None:
    """The fresh process: import, say so, wait for the word, work, and report in one line."""
    # Whatever the work prints must not be taken for the report.
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        module, name = sys.argv[1].split(":")
        prepare: Callable[..., Callable[[], object]] = getattr(importlib.import_module(module), name)
        work = prepare(**json.loads(sys.argv[2]))
        print("ready", file=answer, flush=True)
        if sys.stdin.readline() != _GO:
            return  # whoever asked is gone
        before, cpu, start = status(), time.process_time(), time.perf_counter()
        result = work()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        report = {"seconds": seconds, "cpu_seconds": cpu, "start_status": before, "end_status": status(), "result": result}
        print(json.dumps(report), file=answer)


if __name__ == "__main__":
    main()
