"""A run that is killed, interrupted or out of space at any of its system calls leaves the old result or the new one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from crash_driver import supported
from crash_jobs import FILE_JOBS, MODEL_JOBS

from pyalpaca.files import MARKERS

pytestmark = pytest.mark.skipif(not supported(), reason="the kernel has no seccomp user notification")

HERE = ("here", "here-empty", "merge-here")
"""The jobs that write into the working directory, which can't be exchanged: file by file, not at once."""


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, if there is one: what is tested here is order, and a disk takes its time to flush."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def sweep(how: str, job: str, folder: Path, stride: int = 1) -> dict[str, Any]:
    """In a process of its own: one with threads, as this one may be, can't be forked safely."""
    command = [sys.executable, Path(__file__).with_name("crash_jobs.py"), how, job, folder, str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["outcomes"]
    if job in MODEL_JOBS and job != "adapter":
        assert re.fullmatch("[0-9a-f]{64}", found["old"]["read"]), found["old"]["read"]
        assert found["old"]["read"] != found["new"]["read"]
    return found


def visible(found: dict[str, Any]) -> dict[str, str]:
    """What a reader finds: no folders without files, nothing that is still being written."""
    return {
        path: kind
        for path, kind in found["files"].items()
        if kind != "folder" and not any(part.endswith(".partial") for part in Path(path).parts)
    }


def lacks_markers(left: dict[str, str], whole: dict[str, str]) -> bool:
    """Whether there is all of a model but some or all markers."""
    return left.items() <= whole.items() and all(map(is_marker, whole.keys() - left.keys()))


def is_marker(path: str) -> bool:
    return any(fnmatch(Path(path).name, marker) for marker in MARKERS)


def check_killed(found: dict[str, Any], at_once: bool) -> None:
    """What is left is one of two; where files are renamed one by one, also what no reader takes for a model."""
    old, new = visible(found["old"]), visible(found["new"])
    assert old != new
    kinds = set()
    for outcome in found["outcomes"]:
        left, read = visible(outcome["left"]), outcome["left"]["read"]
        kind = "old" if left == old else "new" if left == new else "between"
        kinds.add(kind)
        if kind != "between":
            assert read == found[kind]["read"], outcome
        elif any(map(is_marker, left)):
            assert lacks_markers(left, old) or lacks_markers(left, new), outcome
        elif read:
            assert re.match("(ValueError|FileNotFoundError): ", read), outcome
        assert outcome["status"] == "killed", outcome
        assert outcome["again"] == found["new"], outcome
    assert kinds == ({"old", "new"} if at_once else {"old", "between", "new"})


def check_full(found: dict[str, Any]) -> None:
    """Each failure is one OSError with the user's own path, and nothing is left; flushing may fail when the new is there."""
    failed = [outcome for outcome in found["outcomes"] if outcome["status"] == "error"]
    assert len(failed) > len(found["outcomes"]) / 2
    for outcome in found["outcomes"]:
        if outcome in failed:
            assert re.fullmatch(r"OSError: \[Errno 28\] No space left on device: '[^']*'", outcome["text"]), outcome
            assert ".partial" not in outcome["text"]
            check_nothing_else(outcome, found, new=outcome["call"] == "fsync")
        else:  # it is no harm if a folder can't be made that is there already, or if trying what can be renamed fails
            assert outcome["call"] in ("mkdir", "mkdirat", "rename", "renameat"), outcome
            assert (outcome["status"], outcome["left"]) == ("done", found["new"]), outcome


def check_interrupted(found: dict[str, Any]) -> None:
    for outcome in found["outcomes"]:
        assert (outcome["status"], outcome["text"]) == ("error", "KeyboardInterrupt: "), outcome
        check_nothing_else(outcome, found, new=True)


def check_nothing_else(outcome: dict[str, Any], found: dict[str, Any], new: bool) -> None:
    """The old result, without what a killed run had left there, or the new one."""
    tidy = {path: kind for path, kind in found["old"]["files"].items() if ".partial" not in path}
    left = outcome["left"]["files"]
    assert left in (found["old"]["files"], tidy) or (new and left == found["new"]["files"]), outcome


@pytest.mark.parametrize("job", FILE_JOBS)
def test_what_is_killed_leaves_the_old_or_the_new_and_the_next_run_succeeds(job: str, memory: Path) -> None:
    check_killed(sweep("kill", job, memory), at_once=job not in HERE)


@pytest.mark.parametrize("job", FILE_JOBS)
def test_what_finds_the_disk_full_leaves_the_old_and_nothing_else(job: str, memory: Path) -> None:
    check_full(sweep("full", job, memory))


@pytest.mark.parametrize("job", FILE_JOBS)
def test_what_is_interrupted_leaves_the_old_or_the_new_and_nothing_else(job: str, memory: Path) -> None:
    check_interrupted(sweep("interrupt", job, memory))


@pytest.mark.parametrize(("job", "stride"), [("megatron", 7), ("merge-here", 5)])
def test_a_model_that_is_killed_while_it_is_written_is_the_old_or_the_new(job: str, stride: int, memory: Path) -> None:
    check_killed(sweep("kill", job, memory, stride), at_once=job not in HERE)


@pytest.mark.long
@pytest.mark.parametrize("job", MODEL_JOBS)
def test_a_model_of_any_layout_that_is_killed_at_any_call_is_the_old_or_the_new(job: str, memory: Path) -> None:
    check_killed(sweep("kill", job, memory), at_once=job not in HERE)


@pytest.mark.long
@pytest.mark.parametrize("job", MODEL_JOBS)
def test_a_model_that_finds_the_disk_full_leaves_the_old_and_nothing_else(job: str, memory: Path) -> None:
    check_full(sweep("full", job, memory))
