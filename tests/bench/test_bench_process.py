"""A fresh process: its own memory is what it allocates, whatever files it maps; its seconds are the work's."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pyalpaca.bench.process import Memory, own_bytes, parse_status, run_fresh, status

MB = 1 << 20
STATUS = """Name:\tpython3
VmPeak:\t  900000 kB
VmHWM:\t  300000 kB
VmRSS:\t  250000 kB
RssAnon:\t  100000 kB
RssFile:\t  140000 kB
RssShmem:\t   10000 kB
Threads:\t4
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")


@pytest.fixture(autouse=True)
def jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def memory(job: str, **arguments: object) -> Memory:
    found = run_fresh(f"bench_jobs:{job}", arguments).memory
    assert found is not None
    return found


def test_a_status_is_bytes() -> None:
    fields = parse_status(STATUS)
    assert fields == {"VmHWM": 307200000, "RssAnon": 102400000, "RssFile": 143360000, "RssShmem": 10240000}
    assert own_bytes(fields) == 102400000 + 10240000


def test_a_process_that_has_ended_has_no_memory() -> None:
    assert parse_status("Name:\tpython3\nState:\tZ (zombie)\n") == {}
    assert status(2**22 + 1) == {}
    assert own_bytes({}) == 0


def test_a_peak_counts_that_is_over_when_the_work_ends() -> None:
    found = memory("allocate", count=200 * MB)
    assert 200 * MB <= found.own - found.baseline < 210 * MB
    assert found.resident >= found.own
    assert found.looks >= 5


def test_what_was_there_before_the_work_is_the_baseline() -> None:
    found = memory("allocated_before", count=100 * MB)
    assert found.baseline > 100 * MB
    assert found.own - found.baseline < 5 * MB


def test_pages_of_a_mapped_file_are_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100 * MB)
    found = memory("look_at", path=str(tmp_path / "file"))
    assert found.own - found.baseline < 5 * MB
    assert found.file >= 100 * MB
    assert found.resident >= found.own + 100 * MB


def test_the_seconds_are_those_of_the_work() -> None:
    run = run_fresh("bench_jobs:wait", {"imports": 0.3, "seconds": 0.2})
    assert 0.2 <= run.seconds < 0.45
    assert run.process_seconds >= run.seconds + 0.3
    assert run.cpu_seconds < 0.1


def test_a_result_comes_back_whatever_was_printed() -> None:
    assert run_fresh("bench_jobs:talk", {"text": "ready"}).result == {"said": "ready"}


def test_between_imports_and_work_the_parent_prepares(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    arguments = {"path": str(tmp_path / "file")}
    assert run_fresh("bench_jobs:changed", arguments).result == ["old", "old"]
    waited = run_fresh("bench_jobs:changed", arguments, lambda: (tmp_path / "file").write_bytes(b"new") and time.sleep(1.0))
    assert waited.result == ["old", "new"]
    assert waited.process_seconds < 1.0 + waited.seconds, "what the parent does does not count"
    with pytest.raises(ZeroDivisionError):
        run_fresh("bench_jobs:changed", arguments, lambda: 1 // 0)


def test_what_fails_is_named_and_all_it_said_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"bench_jobs:fail: the process .* ended with FileNotFoundError: .*'/nowhere'"):
        run_fresh("bench_jobs:fail", {"path": "/nowhere"})
    assert "Traceback" in capsys.readouterr().err
