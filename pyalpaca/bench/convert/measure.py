"""Measuring: every contestant in turn, in a fresh process, with the page cache in the same state for all."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pyalpaca.bench import disk
from pyalpaca.bench.convert.cases import CASES, Case, Settings, Stage, needed_bytes, stages
from pyalpaca.bench.convert.model import ADAPTERS
from pyalpaca.bench.machine import rounded
from pyalpaca.bench.process import Memory, Run, run_fresh
from pyalpaca.files import PARTIAL

_JOBS = "pyalpaca.bench.convert.jobs"
_MARK = ".pyalpaca-bench"

Start = Callable[[Callable[[], object]], Run]
"""Starts a fresh process, given what is to be done between its imports and its work."""


def say(text: str) -> None:
    """One line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def workspace(settings: Settings) -> Iterator[None]:
    """The working folder: new, empty, or an earlier run's. What a run writes is removed again, but for models with `keep`.

    ValueError if the folder holds other files, or the disk is too small.
    """
    folder, mark = settings.work, settings.work / _MARK
    created = not folder.exists()
    if not created and (not folder.is_dir() or (any(folder.iterdir()) and not mark.is_file())):
        raise ValueError(f"{folder}: is no folder or holds files that no benchmark wrote; choose another --work-dir")
    models = [path for stage in stages(settings) for path in _folders(settings, stage)]
    remains = [settings.out, settings.copy]
    disk.remove(*remains, *(path.with_name(path.name + PARTIAL) for path in [*models, *remains]))
    disk.require_space(folder, needed_bytes(settings) - disk.total_size(path for path in models if path.exists()))
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        yield
    finally:
        disk.remove(*remains)
        if list(folder.iterdir()) == [mark]:
            mark.unlink()
            if created:
                folder.rmdir()


@contextmanager
def model(settings: Settings, stage: Stage) -> Iterator[Path]:
    """The folder of a stage's model: made unless an earlier run has left it, and removed afterwards unless it is to stay."""
    folder, megatron = _folders(settings, stage)
    if not folder.exists():
        say(f"making {folder.name}: {stage.source_bytes() / 1e9:.2f} GB")
        made = {"scale": asdict(stage.scale), "out": str(folder), "weights": stage.weights}
        run_fresh("pyalpaca.bench.convert.model:make", made)
    try:
        if stage.megatron and not megatron.exists():
            _convert(folder, megatron, CASES["hf-megatron"])
        yield folder
    finally:
        if not settings.keep:
            disk.remove(folder, megatron)


def _folders(settings: Settings, stage: Stage) -> tuple[Path, Path]:
    folder = settings.work / stage.name
    return folder, _megatron(folder)


def _megatron(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-megatron")


def _sources(folder: Path, case: Case) -> list[Path]:
    base = _megatron(folder) if case.source == "megatron" else folder / "base"
    return [base, *(folder / name for name, *_ in ADAPTERS if case.lora)]


def _convert(folder: Path, out: Path, case: Case, before: Callable[[], object] = lambda: None) -> Run:
    base, *adapters = map(str, _sources(folder, case))
    if case.lora and not case.options:
        return run_fresh(f"{_JOBS}:merge", {"base": base, "adapters": adapters, "out": str(out), "to": case.to}, before)
    options = {**case.options, **({"lora": adapters} if adapters else {})}
    return run_fresh(f"{_JOBS}:convert", {"source": base, "out": str(out), "to": case.to, "options": options}, before)


@dataclass
class Log:
    """What one case has measured so far: seconds by contestant, shares in the page cache, our runs."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    cached: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, list[Memory]] = field(default_factory=dict)

    def add(self, **seconds: float) -> None:
        for name, value in seconds.items():
            self.seconds.setdefault(name, []).append(rounded(value))

    def median(self, name: str) -> float:
        return rounded(statistics.median(self.seconds[name]))

    def largest(self, name: str) -> dict[str, int] | None:
        """Of all runs, the one that took most memory of its own."""
        return asdict(max(self.memory[name], key=lambda m: m.own)) if self.memory.get(name) else None


def _prepare(settings: Settings, log: Log, name: str, sources: Sequence[Path]) -> None:
    """Bring disk, page cache and free memory into the same state for every contestant; note how far the cache got."""
    (disk.warm if settings.cache == "warm" else disk.cool)(sources)
    disk.touch_memory(settings.work, needed_bytes(settings))
    share = disk.cached_share(sources)
    if share is not None:
        log.cached.setdefault(name, []).append(round(share, 3))


def _fresh(settings: Settings, log: Log, name: str, sources: Sequence[Path], out: Path, start: Start) -> Run:
    """One run in a fresh process to a folder that is not there; what it reads is prepared once its imports are done."""
    disk.remove(out)
    result = start(lambda: _prepare(settings, log, name, sources))
    if result.memory is not None:
        log.memory.setdefault(name, []).append(result.memory)
    return result


def _take_turns(repeats: int, *contestants: Callable[[bool], None]) -> None:
    """Everybody once for nothing, then `repeats` rounds whose order is turned round each time; the call says what counts."""
    for contestant in contestants:
        contestant(False)
    for i in range(repeats):
        for contestant in contestants if i % 2 == 0 else reversed(contestants):
            contestant(True)


def measure_cases(settings: Settings) -> list[dict[str, Any]]:
    """One row for each case: ours and cp in turn."""
    stage, rows = stages(settings)[0], []
    with model(settings, stage) as folder:
        for name in settings.cases:
            rows.append(_measure_case(settings, folder, name))
            disk.remove(settings.out)
    return rows


def _measure_case(settings: Settings, folder: Path, name: str) -> dict[str, Any]:
    case, log, out, copy = CASES[name], Log(), settings.out, settings.copy
    sources = _sources(folder, case)

    def ours(counts: bool) -> None:
        done = _fresh(settings, log, "ours", sources, out, partial(_convert, folder, out, case))
        if counts:
            log.add(ours=done.seconds, ours_process=done.process_seconds, ours_cpu=done.cpu_seconds)
        else:
            base, *adapters = map(str, _sources(folder, replace(case, source="base")))
            run_fresh(f"{_JOBS}:check", {"base": base, "adapters": adapters, "out": str(out)})
        say(f"{name}: ours {done.seconds:.2f} s{_note(counts)}")

    def cp(counts: bool) -> None:
        disk.remove(copy)
        _prepare(settings, log, "cp", [out])
        plain, flushed = disk.copy(out, copy)
        disk.remove(copy)
        if counts:
            log.add(cp=flushed, plain_cp=plain)
        say(f"{name}: cp {flushed:.2f} s, not flushed {plain:.2f} s{_note(counts)}")

    _take_turns(settings.repeats, ours, *([cp] if "cp" in settings.peers else []))
    flops = 2 * sum(r for _, r, *_ in ADAPTERS) * (settings.scale.parameters(0) if case.lora else 0)
    return _row(f"{name}/{settings.scale.name}/{settings.cache}", log, ("cp", "plain_cp"), disk.total_size([out])) | {
        "read_bytes": disk.total_size(sources),
        **({"arithmetic_flops": flops} if flops else {}),
    }


def _row(name: str, log: Log, peers: Sequence[str], written: int) -> dict[str, Any]:
    """A row in the shape of docs/architecture.md; `vs` is the peer's time over ours, `ours_over` the inverse."""
    ours, memory = log.median("ours"), log.largest("ours")
    ratios = {peer: log.median(peer) / ours for peer in peers if peer in log.seconds}
    return {
        "name": name,
        "seconds": ours,
        **({"limit": "cp", "limit_share": round(ratios["cp"], 3)} if "cp" in ratios else {}),
        "vs": {peer: round(ratio, 3) for peer, ratio in ratios.items()},
        "ours_over": {peer: round(1 / ratio, 3) for peer, ratio in ratios.items()},
        "process_seconds": log.median("ours_process"),
        "cpu_seconds": log.median("ours_cpu"),
        "written_bytes": written,
        "bytes_per_second": rounded(written / ours),
        "peak_bytes": memory["own"] if memory else None,
        "memory": memory,
        "cached": {who: round(statistics.median(shares), 3) for who, shares in log.cached.items()},
        "timings": log.seconds,
    }


def measure_halved(settings: Settings, rows: Sequence[dict[str, Any]]) -> None:
    """Run each case with half the layers, as often as before, and put the memory that it takes beside the whole model's."""
    stage, out = stages(settings)[1], settings.out
    with model(settings, stage) as folder:
        for name, row in zip(settings.cases, rows, strict=True):
            case, log = CASES[name], Log()
            for _ in range(1 + settings.repeats):
                done = _fresh(settings, log, "ours", _sources(folder, case), out, partial(_convert, folder, out, case))
                log.add(ours=done.seconds)
                say(f"{name}: half the layers {done.seconds:.2f} s")
            memory = log.largest("ours")
            row["half"] = {
                "layers": stage.scale.num_layers,
                "seconds": log.median("ours"),
                "written_bytes": disk.total_size([out]),
                "peak_bytes": memory["own"] if memory else None,
            }
            disk.remove(out)


def measure_peft(settings: Settings) -> dict[str, Any]:
    """One row: the same base in safetensors and the same adapters merged by ours and by peft, both to safetensors."""
    stage, log, out, theirs = stages(settings)[-1], Log(), settings.out, settings.copy
    case = Case("both adapters merged", "hf", lora=True, options={"weights": "safetensors"})
    with model(settings, stage) as folder:
        sources = _sources(folder, case)
        adapters = {str(folder / name): rows for name, _, _, rows in ADAPTERS}
        work = {
            "ours": partial(_convert, folder, out, case),
            "peft": partial(run_fresh, f"{_JOBS}:peft", {"base": str(folder / "base"), "adapters": adapters, "out": str(theirs)}),
        }

        def contestant(name: str, counts: bool) -> None:
            done = _fresh(settings, log, name, sources, out if name == "ours" else theirs, work[name])
            if counts:
                log.add(**{name: done.seconds, f"{name}_process": done.process_seconds, f"{name}_cpu": done.cpu_seconds})
            say(f"merge-hf-peft: {name} {done.seconds:.2f} s{_note(counts)}")

        _take_turns(settings.repeats, *(partial(contestant, name) for name in work))
        compared = run_fresh(f"{_JOBS}:compare", {"a": str(out), "b": str(theirs)}).result
        row = _row(f"merge-hf-peft/{settings.peft_scale.name}/{settings.cache}", log, ("peft",), disk.total_size([out]))
        disk.remove(out, theirs)
    row["vs"]["peft_process"] = round(log.median("peft_process") / log.median("ours_process"), 3)
    row |= {"max_difference": compared["max_difference"], "differing_tensors": compared["different"], "peft_memory": None}
    mine, other = log.largest("ours"), log.largest("peft")
    if mine and other:
        row["peft_memory"] = other
        row["memory_vs"] = {
            "peft": round(other["own"] / mine["own"], 2),
            "peft_above_baseline": round((other["own"] - other["baseline"]) / max(mine["own"] - mine["baseline"], 1), 2),
            "peft_resident": round(other["resident"] / mine["resident"], 2),
        }
    return row


def _note(counts: bool) -> str:
    return "" if counts else " (does not count)"
