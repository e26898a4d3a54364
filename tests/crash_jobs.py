"""What is killed in test_crash.py: small jobs that write a file, a folder or a model over an old one.

`python crash_jobs.py {kill,full,interrupt} JOB FOLDER [STRIDE]` prints what `sweep` returns as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from crash_driver import Job, sweep


def _fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


MODEL = ("config.json", "model.safetensors", "release/rank.pt", "latest_checkpointed_iteration.txt")
"""What the jobs below write: markers, weights, a sub-folder."""


def _write_file(path: Path) -> None:
    from pyalpaca.files import atomic_file

    with atomic_file(path) as partial, partial.open("w") as file:
        for _ in range(3):
            file.write("new")
            file.flush()


def _write_folder(path: Path) -> None:
    from pyalpaca.files import atomic_folder

    with atomic_folder(path) as partial:
        _fill(partial, dict.fromkeys(MODEL, "new"))


def _with_files_of_its_own(folder: Path) -> None:
    _fill(folder / "out", {**dict.fromkeys(MODEL, "old"), "notes.txt": "mine", "release/mine": "mine", "deep/er/.mine": "mine"})
    (folder / "out" / "deep" / "link").symlink_to("er")


def _behind_a_link(folder: Path) -> None:
    """The same, as a link to it, and what a killed run has left."""
    _with_files_of_its_own(folder)
    (folder / "out").rename(folder / "real")
    (folder / "out").symlink_to("real")
    _fill(folder / "real.partial", {"config.json": "half", "release/half": "half"})


def _write_here(folder: Path) -> None:
    os.chdir(folder / "out")
    _write_folder(Path())


def _inputs(folder: Path) -> Path:
    return folder.parent / "inputs"


def _models(folder: Path) -> None:
    """A base model of one layer, an adapter for it, and the seed of another model that is the old result."""
    import checkpoint_makers as makers

    from pyalpaca.checkpoint import memory_reader, write_hf

    config = replace(makers.CONFIG, num_layers=1)
    for name, seed in (("base", 0), ("other", 1)):
        write_hf(memory_reader(config, makers.tensors(config, seed=seed), None), _inputs(folder) / name)
    makers.make_adapter(_inputs(folder) / "adapter", config=config, targets=("q_proj",))


def _model_job(write: Callable[[Path, str], object], name: str = "out") -> Job:
    """write: (output, input model) -> writes the model. name: of the output."""
    from pyalpaca.checkpoint import digest, open_checkpoint

    def prepare(folder: Path) -> None:
        _models(folder)
        write(folder / name, str(_inputs(folder) / "other"))
        if (folder / name).is_dir():
            _fill(folder / name, {"notes.txt": "mine"})

    return Job(
        prepare,
        lambda folder: write(folder / name, str(_inputs(folder) / "base")),
        lambda folder: digest(open_checkpoint(folder / name)),
    )


def _convert(to: str, name: str = "out", **how: object) -> Job:
    from pyalpaca.checkpoint import convert

    return _model_job(lambda out, model: convert(model, out, to, **how), name)


def _merge_here() -> Job:
    """As the original script does it by default: Meta's layout into the working directory."""
    from pyalpaca.checkpoint import merge

    def write(out: Path, model: str) -> None:
        out.mkdir(exist_ok=True)
        os.chdir(out)
        try:
            merge(model, [Path(model).parent / "adapter"], "./", "meta", num_shards=2)
        finally:
            os.chdir("/")

    return _model_job(write)


def _adapter() -> Job:
    import checkpoint_makers as makers

    def write(folder: Path, seed: int) -> None:
        makers.make_adapter(folder / "out", config=replace(makers.CONFIG, num_layers=1), seed=seed)

    return Job(lambda folder: write(folder, 1), lambda folder: write(folder, 2))


FILE_JOBS = {
    "file": Job(lambda folder: None, lambda folder: _write_file(folder / "new" / "out")),
    "file-over-old": Job(lambda folder: _fill(folder, {"out": "old"}), lambda folder: _write_file(folder / "out")),
    "folder": Job(lambda folder: None, lambda folder: _write_folder(folder / "new" / "er" / "out")),
    "folder-empty": Job(lambda folder: (folder / "out").mkdir(), lambda folder: _write_folder(folder / "out")),
    "folder-over-old": Job(_with_files_of_its_own, lambda folder: _write_folder(folder / "out")),
    "folder-behind-a-link": Job(_behind_a_link, lambda folder: _write_folder(folder / "out")),
    "here": Job(_with_files_of_its_own, _write_here),
    "here-empty": Job(lambda folder: (folder / "out").mkdir(), _write_here),
}

MODEL_JOBS: dict[str, Callable[[], Job]] = {
    "hf": lambda: _convert("hf", max_shard_size="20kB"),
    "meta": lambda: _convert("meta"),
    "megatron": lambda: _convert("megatron", tp=2),
    "native": lambda: _convert("native"),
    "gguf": lambda: _convert("gguf", "out.gguf"),
    "merge-here": _merge_here,
    "adapter": _adapter,
}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent / "checkpoint"))  # for checkpoint_makers
    how, name, folder, *stride = sys.argv[1:]
    job = MODEL_JOBS[name]() if name in MODEL_JOBS else FILE_JOBS[name]
    print(json.dumps(sweep(job, Path(folder), how, *map(int, stride))))
