"""Our own layout, for training: a native checkpoint (see native_files), and the run folder that holds one for each saved step.

A run folder holds `step_0000010` folders, and `latest`, a text file with the name of the newest. What is damaged in a step is
a DamagedError that names the file, and the newest earlier step of the run that opens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pyalpaca.checkpoint import tokens
from pyalpaca.checkpoint.canonical import Reader, check_shapes, parse_config
from pyalpaca.checkpoint.container.safetensors_file import safetensors_layout
from pyalpaca.checkpoint.container.tensor_file import Piece
from pyalpaca.checkpoint.native_files import (
    MANIFEST,
    DamagedError,
    NativeTensors,
    manifest_entry,
    read_manifest,
    read_native_files,
    write_native_manifest,
)
from pyalpaca.checkpoint.plan import Checksums, Plan, as_it_is, execute
from pyalpaca.files import atomic_file
from pyalpaca.model import LlamaConfig, whole_slice
from pyalpaca.ops import lora_merge

_STEP = re.compile(r"step_\d+")


def write_latest(run: Path, step_folder: str) -> None:
    """Point a run folder at its newest checkpoint."""
    with atomic_file(run / "latest") as partial:
        partial.write_text(step_folder + "\n", encoding="utf-8")


def native_steps(run: Path) -> list[Path]:
    """The step folders of a run, the one that `latest` names first, then the older ones from new to old.

    Newer ones are left out: the run died before `latest` named them, or has been set back. If `latest` is missing or names
    nothing that is there, all of them.
    """
    steps = sorted((p for p in run.glob("step_*") if _STEP.fullmatch(p.name) and p.is_dir()), reverse=True)
    named = _latest(run)
    return [p for p in steps if p.name <= named] if named in {p.name for p in steps} else steps


def find_native(path: Path) -> Path | None:
    """The checkpoint folder that `path` is or, for a run folder, that its `latest` names; None if it is neither.

    DamagedError if what `latest` should name is not there.
    """
    if (path / MANIFEST).is_file():
        return path
    named, steps = _latest(path), native_steps(path)
    if not steps and not _STEP.fullmatch(named):
        return None  # others write a `latest` too
    if not _STEP.fullmatch(named):
        raise DamagedError(f"{path / 'latest'}: {_instead(path, steps, 'does not name a step of this run')}")
    if not (path / named / MANIFEST).is_file():
        problem = f"not found, but {path / 'latest'} names it"
        raise DamagedError(f"{path / named / MANIFEST}: {_instead(path, [s for s in steps if s.name != named], problem)}")
    return path / named


def read_native_meta(path: Path) -> dict[str, Any]:
    """The `meta` that was given to write_native_manifest; `path` may be a run folder."""
    return dict(_manifest(path)[1]["meta"])


def _latest(run: Path) -> str:
    file = run / "latest"
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""


def _instead(run: Path, steps: Iterable[Path], problem: str) -> str:
    """The problem, and which of these steps to use."""
    whole = next((step for step in steps if _opens(step)), None)
    return f"{problem}; {f'use {whole}, the last good checkpoint' if whole else f'no earlier checkpoint in {run} is whole'}"


def _opens(folder: Path) -> bool:
    try:
        for kind in ("model", "optimizer"):
            read_native_files(folder, kind)
    except (ValueError, OSError):
        return False
    return True


@contextmanager
def _naming_another(folder: Path) -> Iterator[None]:
    """Let what is damaged in a step of a run be one error that says which step to use instead."""
    try:
        yield
    except DamagedError as error:
        run = folder.parent
        if not _STEP.fullmatch(folder.name):
            raise DamagedError(f"{error}; restore it or use another") from None
        steps = [step for step in native_steps(run) if step.name < folder.name]
        raise DamagedError(_instead(run, steps, str(error))) from None


def _manifest(path: Path) -> tuple[Path, dict[str, Any]]:
    folder = find_native(path)
    if folder is None and _STEP.fullmatch(path.name) and path.is_dir():
        folder = path
    if folder is None:
        raise FileNotFoundError(f"{path}: is no checkpoint of a run, expected {MANIFEST} or step_* folders with a `latest` file")
    with _naming_another(folder):
        return folder, read_manifest(folder)


def native_tensors(path: Path, kind: str) -> NativeTensors:
    """The `model` or `optimizer` tensors of a native checkpoint or the latest of a run folder.

    Raises DamagedError naming a shard that is missing, truncated or damaged, or a tensor that the shards don't cover just
    once, and the last good step of the run. A checksum is compared when its piece is first read.
    """
    folder = _manifest(path)[0]
    with _naming_another(folder):
        tensors = read_native_files(folder, kind)

    def read(name: str, piece: Piece | Sequence[Piece] | None) -> Tensor:
        with _naming_another(folder):
            return tensors.read(name, piece)

    return replace(tensors, read=read)


def open_native(path: Path) -> Reader:
    """A Reader over the model in a native checkpoint or the latest of a run folder.

    LoRA factors in it are merged as the forward pass applies them: W + (B A) * config.lora_scale, in W's own dtype.
    """
    model = native_tensors(path, "model")
    fields = _manifest(path)[1]
    config = parse_config(model.path / MANIFEST, lambda: LlamaConfig(**fields["config"]), len(model.shapes))
    hint = f"{MANIFEST} describes an incomplete model; use an earlier step"
    shapes = check_shapes(model.path, config, model.shapes, hint)
    factors = {name for name in model.shapes if name.endswith((".lora_A.weight", ".lora_B.weight"))}
    if extra := set(model.shapes) - set(shapes) - factors:
        raise ValueError(f"{model.path}: {min(extra)} is no tensor of a LLaMA model with this config")

    def fetch(name: str, piece: Piece | None) -> Tensor:
        stem = name.removesuffix(".weight")
        weight = model.read(name, piece)
        if f"{stem}.lora_A.weight" not in factors:
            return weight
        a, b = (model.read(f"{stem}.lora_{x}.weight", None).float() for x in "AB")
        if piece is not None:
            a, b = (whole_slice(a, piece), b) if piece[0] == 1 else (a, whole_slice(b, piece))
        return lora_merge(weight, [(b, a, config.lora_scale)])

    return Reader(
        layout="native",
        path=model.path,
        config=replace(config, lora_scale=1.0),
        shapes=shapes,
        dtypes={name: model.dtypes[name] for name in shapes},
        fetch=fetch,
        tokenizer=tokens.find(model.path, model.path.parent),
    )


def plan_native(reader: Reader, meta: Mapping[str, Any] | None = None) -> Plan:
    """A native checkpoint, one shard for each layer and one for the rest; `meta` as in write_native_manifest."""
    groups: dict[str, list[str]] = {}
    for name in reader.names:
        group = f"layer{int(name.split('.')[2]):03d}" if name.startswith("model.layers.") else "ends"
        groups.setdefault(f"model-{group}.safetensors", []).append(name)
    files = [
        safetensors_layout(file, {name: (reader.shapes[name], reader.dtypes[name]) for name in names}, needs_checksums=True)
        for file, names in groups.items()
    ]

    def finish(folder: Path, checksums: Checksums) -> None:
        entries = [
            manifest_entry("model", file, name, reader.dtypes[name], reader.shapes[name], None, checksums[file][name])
            for file, names in groups.items()
            for name in names
        ]
        write_native_manifest(folder, reader.config, entries, meta or {})
        tokens.copy(reader.tokenizer, folder)

    steps = [as_it_is(file, name) for file, names in groups.items() for name in names]
    return Plan("native", reader, files, steps, (MANIFEST, *tokens.present(reader.tokenizer)), finish)


def write_native(reader: Reader, out: str | Path, meta: Mapping[str, Any] | None = None) -> None:
    """Write a reader's model as a native checkpoint."""
    execute(plan_native(reader, meta), out)
