"""The modelled timeline answers to what it models, worked out by hand on small kernels, and the command says what it is."""

from __future__ import annotations

import ctypes
import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pyalpaca.bench.ascend import run
from pyalpaca.bench.ascend.cases import CASES
from pyalpaca.bench.ascend.library import build_folder, kernel_library, sources
from pyalpaca.bench.ascend.picture import Lane
from pyalpaca.bench.ascend.processors import ASSUMED, PROCESSORS, Assumed, each_costlier
from pyalpaca.bench.ascend.timeline import Entry, Launch, Reserved, Timeline, play

B2 = PROCESSORS["B2"]
CYCLE = 1 / 1.8e9
# Nothing but the published rates: instructions and copies cost no more than their bytes.
BARE = Assumed(vector_path=64, cube_path=128, issue=0, vector_start=0, cube_start=0, copy_start=0, copy_latency=0, scalar_miss=0)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return kernel_library([Path(__file__).with_name("timeline.cpp")])


def tiles(library: ctypes.CDLL, cores: int, tiles: int, buffers: int, passes: int, assumed: Assumed = BARE) -> Timeline:
    data = Reserved(cores * tiles * 16384)
    arguments = {"x": data, "y": data, "tiles": tiles, "buffers": buffers, "passes": passes}
    return play(library, Launch("tiles_through_buffers", "AIV", cores, arguments), B2, assumed, entries=True)


@pytest.mark.parametrize(
    ("which", "cycles"),
    [(0, 64), (1, 128), (2, 128), (3, 7 * 64), (4, 64), (5, 64)],
    ids=["add", "exp", "fma", "whole", "cast", "block"],
)
def test_an_instruction_takes_its_published_cycles(library: ctypes.CDLL, which: int, cycles: int) -> None:
    launch = Launch("instruction", "AIV", 1, {"which": which, "times": 10})
    assert play(library, launch, B2, BARE).seconds == pytest.approx(10 * cycles * CYCLE)
    start = dataclasses.replace(BARE, vector_start=14)
    assert play(library, launch, B2, start).seconds == pytest.approx(10 * (cycles + 14) * CYCLE)


def test_one_core_is_bound_by_its_path_and_many_by_memory(library: ctypes.CDLL) -> None:
    load = 16384 / 64  # cycles of one tile on one core's path
    assert tiles(library, 1, 1, 1, 1).seconds == pytest.approx((2 * load + 64) * CYCLE)
    assert tiles(library, 1, 1, 1, 1, dataclasses.replace(BARE, copy_start=40, copy_latency=100)).seconds == pytest.approx(
        (2 * (load + 140) + 64) * CYCLE
    )
    many = tiles(library, 48, 64, 2, 1)
    bytes_moved = 2 * 48 * 64 * 16384
    assert many.hbm_bytes == bytes_moved
    assert bytes_moved / 1.6e12 <= many.seconds <= 1.05 * bytes_moved / 1.6e12


def test_single_buffering_costs_what_it_costs(library: ctypes.CDLL) -> None:
    load, compute, count = 16384 / 64, 4 * 64, 50  # all three pipes take 256 cycles a tile
    assert load == compute
    one, two, three = (tiles(library, 1, count, buffers, 4).seconds for buffers in (1, 2, 3))
    assert one == pytest.approx(3 * load * count * CYCLE)  # load, compute, store, one after the other
    assert two == pytest.approx(1.5 * load * count * CYCLE, rel=0.05)  # two tiles under way on three pipes
    assert three == pytest.approx(load * count * CYCLE, rel=0.05)  # no pipe waits


def test_a_real_kernel_with_one_buffer_is_slower(library: ctypes.CDLL) -> None:
    (launch, _) = CASES["rms_norm_backward"].make(library, B2, (1024, 1024), "bfloat16").launches
    assert launch.arguments["buffers"] == 2
    single = dataclasses.replace(launch, arguments={**launch.arguments, "buffers": 1})
    assert play(library, single, B2).seconds > 1.1 * play(library, launch, B2).seconds


def test_what_l2_holds_is_not_read_from_hbm_again(library: ctypes.CDLL) -> None:
    again = play(library, Launch("read_again", "AIV", 1, {"x": Reserved(16384), "times": 7}), B2, BARE)
    assert again.hbm_bytes == 16384 and again.l2_bytes == 7 * 16384
    small = dataclasses.replace(B2, l2_bytes=8192)  # less than what is read: nothing stays
    assert play(library, Launch("read_again", "AIV", 1, {"x": Reserved(16384), "times": 7}), small, BARE).hbm_bytes == 7 * 16384


def test_entries_of_a_pipe_do_not_overlap_and_add_up_to_its_busy_share(library: ctypes.CDLL) -> None:
    timeline = tiles(library, 2, 9, 2, 3, ASSUMED)
    (core,) = [core for core in timeline.cores if core.entries]
    for pipe in ("MTE2", "V", "MTE3"):
        entries = [entry for entry in core.entries if entry.pipe == pipe]
        assert len(entries) == (27 if pipe == "V" else 9)
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(entries))
        busy = sum(entry.end - entry.start for entry in entries) / (timeline.seconds * 1e6)
        assert busy == pytest.approx(timeline.busy[pipe], rel=0.05)


@pytest.mark.parametrize(("head_dim", "length"), [(128, 1024), (64, 512)])
def test_the_products_of_attention_are_counted(library: ctypes.CDLL, head_dim: int, length: int) -> None:
    work = CASES["flash_forward_full"].make(library, B2, (1, length, 4, 4, head_dim), "half")
    assert play(library, work.launches[0], B2).cube_flops == work.amount
    half = CASES["flash_forward"].make(library, B2, (1, length, 4, 4, head_dim), "half")
    assert half.amount < play(library, half.launches[0], B2).cube_flops < work.amount  # and a part of the diagonal


@pytest.mark.parametrize("kernel", [name for name in CASES if not name.startswith("flash") or name == "flash_decode"])
def test_kernels_bound_by_memory_reach_its_bandwidth(library: ctypes.CDLL, kernel: str) -> None:
    case = CASES[kernel]
    row, _ = run.model(library, kernel, case, B2, case.shapes[0], "bfloat16", False)
    assert row["limit_share"] >= (0.75 if kernel == "rope" else 0.8), row
    assert row["bound"] in ("HBM", "AIC.MTE2") and 0.5 < row["limit_share_costs_doubled"] < row["limit_share"]
    assert row["hbm_bytes"] == pytest.approx(case.make(library, B2, case.shapes[0], "bfloat16").amount, rel=0.02)


def test_a_slower_processor_is_slower(library: ctypes.CDLL) -> None:
    work = CASES["flash_forward"].make(library, PROCESSORS["B4"], (1, 512, 20, 20, 128), "half")
    assert play(library, work.launches[0], PROCESSORS["B4"]).seconds > play(library, work.launches[0], B2).seconds


def test_the_command_writes_table_picture_trace_and_one_json_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("plot", "trace", "csv", "json", "markdown")}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    assert run.main(["--kernel", "rms_norm", "--shapes", "512x1024", "--soc", "B3", *options]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "modelled, never measured: no NPU took part"
    result: dict[str, Any] = json.loads(out[-1])
    assert result["bench"] == "ascend" and result["label"] == "modelled, never measured"
    (row,) = result["rows"]
    assert row["name"] == "rms_norm/bfloat16/512x1024" and row["modelled"] is True and row["processor"] == "910B3"
    assert json.loads(files["json"].read_text()) == result
    assert files["plot"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    events = json.loads(files["trace"].read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} >= {
        "AIV V: vector",
        "AIV MTE2: memory to UB",
        "AIV MTE3: UB to memory",
    }
    assert events[0]["args"]["name"].endswith("; the vector core (AIV) of 40 that ends last")
    assert "modelled, never measured" in events[0]["args"]["name"] and "modelled, never measured" in files["markdown"].read_text()
    assert "rms_norm/bfloat16/512x1024" in files["csv"].read_text()


def test_each_assumed_cost_is_doubled_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = each_costlier(ASSUMED, 2)
    assert alone["issue"] == dataclasses.replace(ASSUMED, issue=16) and alone["cube_path"] == dataclasses.replace(
        ASSUMED, cube_path=64
    )
    options = ["--kernel", "rms_norm", "--shapes", "512x1024", "--costs", "--markdown", str(tmp_path / "page.md")]
    assert run.main(options) == 0
    out = capsys.readouterr().out.splitlines()
    (row,) = json.loads(out[-1])["rows"]
    shares = row["limit_share_one_cost_doubled"]
    assert set(shares) == {field.name for field in dataclasses.fields(Assumed)}
    # Of a kernel without a cube core: those of cube cores cost nothing, those of vector cores less than all together.
    assert shares["cube_path"] == shares["cube_start"] == row["limit_share"]
    assert row["limit_share_costs_doubled"] < min(shares.values()) < row["limit_share"]
    dearest = min(shares, key=lambda cost: shares[cost])
    assert f"with one assumed cost doubled: {dearest} " in out[-2]
    assert f"| {dearest} " in (tmp_path / "page.md").read_text()


def test_a_lane_is_busy_in_the_time_that_is_shown() -> None:
    entries = (Entry("V", 1.0, 3.0, "Add", 1), Entry("V", 7.0, 11.0, "Exp", 2), Entry("V", 12.0, 13.0, "Add", 3))
    lane = Lane("AIV1", "V", entries)
    assert lane.name == "AIV1 V: vector"
    assert lane.busy(10.0) == pytest.approx(0.5) and lane.busy(20.0) == pytest.approx(7 / 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "softmax"], "there is no kernel 'softmax': choose from rms_norm"),
        (["--soc", "A"], "there is no processor 'A': choose from B1, B2, B3, B4"),
        (["--kernel", "rope", "--shapes", "8x8"], "rope: the shape 8x8 is not tokens x heads x kv heads x d"),
        (["--kernel", "flash_forward", "--dtype", "float"], "flash_forward has no type 'float'"),
        (["--plot", "x.png"], "--plot and --trace show one kernel"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run.main(arguments)


def test_a_shape_without_a_tiling_is_refused(library: ctypes.CDLL) -> None:
    with pytest.raises(ValueError, match="rms_norm has no tiling for 8x9000; choose another shape"):
        CASES["rms_norm"].make(library, B2, (8, 9000), "half")


def test_without_a_compiler_or_sources_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pyalpaca.bench.ascend import library

    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(FileNotFoundError, match="no C\\+\\+ compiler `/nowhere/c\\+\\+` found, needed to compile the emulation"):
        library.compiler()
    monkeypatch.setattr(library, "_PACKAGE", tmp_path / "site-packages/pyalpaca")
    with pytest.raises(
        FileNotFoundError, match=r"no sources of the kernels in .*_csrc, expected those the package was built with"
    ):
        sources()
    (tmp_path / "site-packages/pyalpaca/_csrc/emu").mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build_folder() == tmp_path / "cache/pyalpaca/emu"


@pytest.mark.parametrize("kernel", list(CASES))
def test_every_kernel_is_modelled_in_every_type(library: ctypes.CDLL, kernel: str) -> None:
    case = CASES[kernel]
    shape = {2: (300, 1000), 4: (300, 6, 2, 64), 5: (2, 600, 6, 2, 64)}[len(case.shapes[0])]
    for dtype in case.dtypes:
        row, _ = run.model(library, kernel, case, B2, shape, dtype, False)
        assert 0 < row["limit_share"] < 1 and 0 < row["busy"][row["bound"]] <= 1
        assert (row["cube_flops"] > 0) == kernel.startswith("flash")
