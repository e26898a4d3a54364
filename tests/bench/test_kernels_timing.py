"""Turns are fair, a slow call is made once, memory and page faults are those of the call."""

from __future__ import annotations

import mmap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyalpaca.bench.kernels import device as devices
from pyalpaca.bench.kernels.device import Call, Device, cpu_peak, open_device
from pyalpaca.bench.kernels.limits import Limits, measure_limits
from pyalpaca.bench.kernels.operator import Work
from pyalpaca.bench.kernels.timing import Budget, Samples, take_turns
from pyalpaca.ops import backend, backend_report

MB = 1 << 20

with backend("cpp"):
    built = backend_report()[0].backend == "cpp"


def recorder(log: list[str]) -> Device:
    """A device that notes what is done to it."""
    return Device("cpu", lambda: log.append("wait"), lambda: log.append("flush"), lambda call: (call(), 7)[1])


def test_each_turn_empties_the_caches_waits_and_turns_the_order_round() -> None:
    log: list[str] = []
    calls: dict[str, Call] = {name: lambda name=name: (log.append(name), time.sleep(0.011))[1] for name in "ab"}
    found = take_turns(calls, recorder(log), Budget(seconds=0, rounds=3))
    turn = {name: ["flush", "wait", name, "wait", name, "wait"] for name in "ab"}
    # Once for the memory; then a cold call, and warm ones until 10 ms are over: one of 11 ms.
    assert log == ["a", "wait", "b", "wait", *turn["a"], *turn["b"], *turn["b"], *turn["a"], *turn["a"], *turn["b"]]
    for samples in found.values():
        assert len(samples.cold) == len(samples.warm) == len(samples.faults) == 3 and samples.peak == 7
        assert 0.011 <= samples.seconds < 0.05 and samples.cold_seconds is not None and samples.cold_seconds >= 0.011


def test_everyone_gets_seconds_or_rounds_whichever_is_more() -> None:
    found = take_turns({"quick": lambda: None, "longer": lambda: time.sleep(0.02)}, recorder([]), Budget(0.1, rounds=4))
    assert len(found["longer"].cold) == 4
    assert len(found["quick"].cold) > 50 and len(found["quick"].warm) > 20 * len(found["quick"].cold)


@pytest.mark.parametrize(("longest", "calls"), [(0.2, 2), (0.045, 1)])
def test_a_slow_call_is_timed_once(longest: float, calls: int) -> None:
    times = iter([0.05, 0.06])
    found = take_turns({"slow": lambda: time.sleep(next(times))}, recorder([]), Budget(slow=0.04, longest=longest))["slow"]
    assert [*times] == ([] if calls == 2 else [0.06])
    assert found.seconds >= (0.06 if calls == 2 else 0.05) and found.cold_seconds is None and found.spread == 0
    assert len(found.warm) == len(found.faults) == 1


def test_the_spread_is_the_middle_half_over_the_median() -> None:
    assert Samples(warm=[4.0, 1.0, 2.0, 3.0, 100.0]).spread == pytest.approx((4 - 2) / 3)
    assert Samples(warm=[2.0] * 5).spread == 0


def test_page_faults_are_those_of_one_call() -> None:
    def fresh() -> None:
        with mmap.mmap(-1, 4 * MB) as memory:
            memory.write(b"x" * (4 * MB))

    found = take_turns({"fresh": fresh, "none": lambda: None}, recorder([]), Budget(0.05))
    pages = 4 * MB // mmap.PAGESIZE
    assert pages <= sorted(found["fresh"].faults)[2] < 3 * pages
    assert sorted(found["none"].faults)[len(found["none"].faults) // 2] == 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="there is no /proc/self/clear_refs")
def test_peak_memory_is_what_a_call_takes_beyond_what_was_held() -> None:
    held = torch.ones(10 * MB)  # 40 MB
    for _ in range(2):
        peak = cpu_peak(lambda: (held + 1).sum())
        assert peak is not None and 39 * MB < peak < 46 * MB
    nothing = cpu_peak(lambda: None)
    assert nothing is not None and nothing < MB


def test_no_peak_where_the_system_does_not_reset_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "_CLEAR", tmp_path / "nowhere" / "clear_refs")
    called = []
    assert cpu_peak(lambda: called.append(1)) is None
    assert called == [1]


def test_the_caches_are_emptied_by_writing_more_than_they_hold() -> None:
    assert devices.last_level_cache() >= 256 << 10
    open_device("cpu", 1 << 20).flush()


def test_an_npu_is_waited_for_and_tells_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    npu = SimpleNamespace(
        synchronize=lambda: log.append("wait"),
        reset_peak_memory_stats=lambda: log.append("reset"),
        memory_allocated=lambda: 100,
        max_memory_allocated=lambda: 350,
    )
    monkeypatch.setattr(devices, "import_module", lambda name: SimpleNamespace(npu=npu) if name == "torch_npu" else None)
    monkeypatch.setattr(
        torch, "zeros", lambda *shape, dtype, device: torch.ones(*shape, dtype=dtype) if device == "npu" else None
    )
    device = open_device("npu", 1 << 10)
    assert device.name == "npu" and device.peak(lambda: log.append("call")) == 250
    assert log == ["wait", "reset", "call", "wait"]
    device.flush()
    device.synchronize()
    assert log[-1] == "wait"


def limits(copy: float = 50.0, read: float = 100.0) -> Limits:
    return Limits("sgemm", 1000.0, copy, read, {}, {})


@pytest.mark.parametrize(
    ("work", "bound"),
    [
        (Work(10, 100, 100), ("copy", 4.0)),
        (Work(10, 100, 9), ("read", 1.09)),
        (Work(5000, 100, 100), ("sgemm", 5.0)),
        (Work(0, 0, 100), ("copy", 2.0)),
    ],
)
def test_the_longer_of_computing_and_moving_bounds(work: Work, bound: tuple[str, float]) -> None:
    assert limits().bound(work) == bound


@pytest.mark.skipif(not built, reason="the extension is not built")
def test_the_limits_are_the_best_of_their_ways() -> None:
    found = measure_limits(open_device("cpu", 1 << 20), memory_bytes=8 * MB, seconds=0.01)
    for kind, rate in (("sgemm", found.flops), ("copy", found.copy), ("read", found.read)):
        assert rate == found.rate(kind) == max(r for name, r in found.probes.items() if name.startswith(kind + "/"))
        amount, call = found.ways[kind]
        call()
        assert amount in {"sgemm": [2.0 * 1024**3], "copy": [16 * MB], "read": [8 * MB, 16 * MB]}[kind]  # dot reads both buffers
    assert {"copy/streamed", "copy/torch.copy_", "read/streamed", "read/torch.amax"} <= set(found.probes)
    assert found.summary() == {"sgemm_flops": found.flops, "copy_bytes": found.copy, "read_bytes": found.read}


@pytest.mark.skipif(not built, reason="the extension is not built")
@pytest.mark.parametrize(("count", "start"), [(0, 0), (7, 0), (64, 0), (5 * MB + 13, 0), (3 * MB, 5), (2 * MB + 71, 16)])
def test_copying_and_reading_miss_no_byte(count: int, start: int) -> None:
    from pyalpaca.ops import extension

    source = torch.randint(256, (count + start,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    target = torch.zeros(count + start + 64, dtype=torch.uint8)
    extension.module().copy_memory(source.data_ptr() + start, target.data_ptr() + start, count)
    assert torch.equal(target[start : start + count], source[start:])
    assert not target[:start].any() and not target[start + count :].any()
    words = torch.zeros(-(-count // 8) * 8, dtype=torch.uint8)
    words[:count] = source[start:]
    expected = 0
    for lane in range(8):
        byte = 0
        for bit in range(8):
            byte |= int((words[lane::8] >> bit & 1).sum() % 2) << bit
        expected |= byte << (8 * lane)
    assert extension.module().read_memory(source.data_ptr() + start, count) == expected
