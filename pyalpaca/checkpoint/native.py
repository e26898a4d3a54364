"""Our own layout, for training: `manifest.json` and safetensors shards, one for each rank that writes.

A shard holds boxes of whole tensors (a tensor-parallel piece, an optimizer's share of it); the manifest says where each box lies.
So a checkpoint written by one layout of ranks is read by any other. No torch.distributed here: each rank calls
`write_native_shard`, the lists it returns are gathered, and one rank calls `write_native_manifest`.

A run folder holds `step_0000010` folders like this one, and `latest`, a text file with the name of the newest.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pyalpaca.checkpoint import tokens
from pyalpaca.checkpoint.canonical import DTYPES, Reader, check_shapes, own, parse_config
from pyalpaca.checkpoint.container.safetensors_file import safetensors_layout
from pyalpaca.checkpoint.container.tensor_file import Piece, TensorFile, dtype_name, raw_bytes, read_json
from pyalpaca.checkpoint.container.torch_file import open_tensors
from pyalpaca.checkpoint.plan import Checksums, Plan, as_it_is, execute, write_file
from pyalpaca.files import atomic_file
from pyalpaca.model import LlamaConfig, natural_key, whole_slice
from pyalpaca.ops import lora_merge

MANIFEST = "manifest.json"
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(start of each dimension, size of each dimension)."""
Entry = dict[str, Any]
Shard = Mapping[str, tuple[Tensor, tuple[int, ...], Piece | Sequence[Piece] | None]]


@dataclass(frozen=True)
class NativeTensors:
    """The tensors of one kind (`model` or `optimizer`) in a native checkpoint, read whole or in pieces, whoever wrote them."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str, Piece | Sequence[Piece] | None], Tensor]


def write_native_shard(folder: Path, shard_id: str, tensors: Shard, kind: str) -> list[Entry]:
    """Write what one rank owns to `{kind}-{shard_id}.safetensors`; returns its manifest entries.

    tensors: {canonical name: (tensor, shape of the whole, where it lies in the whole)}; the place is one (dim, start, stop),
    several of them for a box cut along more than one dimension, or None for the whole. Each element of a tensor must be
    given by just one shard. An empty piece is left out.
    """
    file, entries, data = f"{kind}-{shard_id}.safetensors", [], {}
    for name, (tensor, whole, piece) in tensors.items():
        _, size = _box(whole, piece)
        if tuple(tensor.shape) != size:
            raise AssertionError(f"{name}: the piece is {tuple(tensor.shape)}, its place in {whole} is {size}")
        if tensor.numel() == 0:
            continue
        data[name] = own(tensor.cpu())
        entries.append(_entry(kind, file, name, tensor.dtype, whole, piece, zlib.crc32(raw_bytes(data[name]))))
    layout = safetensors_layout(file, {n: (tuple(t.shape), t.dtype) for n, t in data.items()})
    write_file(layout, folder / file, data)
    return entries


def write_native_manifest(folder: Path, config: LlamaConfig, entries: Iterable[Entry], meta: Mapping[str, Any]) -> None:
    """Write the manifest over all shards' entries. `meta` is what the run wants back: step, data position, loss scale, ..."""
    fields = {"format": "pyalpaca", "version": 1, "config": asdict(config), "meta": dict(meta)}
    lines = ",\n".join(json.dumps(entry) for entry in entries)  # one line each: readable, and short for thousands
    with atomic_file(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(fields)[:-1] + f', "tensors": [\n{lines}\n]}}\n', encoding="utf-8")


def write_latest(run: Path, step_folder: str) -> None:
    """Point a run folder at its newest checkpoint."""
    with atomic_file(run / "latest") as partial:
        partial.write_text(step_folder + "\n", encoding="utf-8")


def find_native(path: Path) -> Path | None:
    """The checkpoint folder that `path` is or, for a run folder, that its `latest` names; None if it is neither."""
    if (path / MANIFEST).is_file():
        return path
    if not (path / "latest").is_file():
        return None
    name = (path / "latest").read_text(encoding="utf-8", errors="replace").strip()
    if Path(name).name != name or not name.startswith("step_"):
        return None
    if not (path / name / MANIFEST).is_file():
        raise FileNotFoundError(f"{path / name / MANIFEST}: not found, but {path / 'latest'} names it; correct or restore it")
    return path / name


def read_native_meta(path: Path) -> dict[str, Any]:
    """The `meta` that was given to write_native_manifest; `path` may be a run folder."""
    return dict(_manifest(path)[1]["meta"])


def _manifest(path: Path) -> tuple[Path, dict[str, Any]]:
    folder = find_native(path)
    if folder is None:
        raise FileNotFoundError(f"{path}: is no checkpoint of a run, expected {MANIFEST} or step_* folders with a `latest` file")
    fields = read_json(folder / MANIFEST)
    if fields.get("format") != "pyalpaca" or fields.get("version") != 1:
        raise ValueError(
            f"{folder / MANIFEST}: format {fields.get('format')!r} version {fields.get('version')!r}, expected pyalpaca 1"
        )
    keys = {"kind", "name", "dtype", "shape", "start", "size", "file", "crc32"}
    kinds = {"config": dict, "meta": dict, "tensors": list}
    whole = all(isinstance(fields.get(key), kind) for key, kind in kinds.items())
    if not whole or not all(isinstance(entry, dict) and set(entry) >= keys for entry in fields["tensors"]):
        raise ValueError(f"{folder / MANIFEST}: is incomplete, expected config, meta and tensors; use an earlier step")
    return folder, fields


def native_tensors(path: Path, kind: str) -> NativeTensors:
    """The `model` or `optimizer` tensors of a native checkpoint or the latest of a run folder.

    Raises ValueError or FileNotFoundError naming a shard that is missing, truncated or damaged, or a tensor that the shards
    don't cover just once. A checksum is compared when its piece is first read.
    """
    folder, fields = _manifest(path)
    entries: dict[str, list[Entry]] = {}
    for entry in fields["tensors"]:
        if entry["kind"] == kind:
            entries.setdefault(entry["name"], []).append(entry)
    shapes = {name: tuple(of[0]["shape"]) for name, of in entries.items()}
    for name, of in entries.items():
        _check_cover(folder, name, shapes[name], of)
    names = sorted({e["file"] for of in entries.values() for e in of}, key=natural_key)
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{folder / MANIFEST}: names the file {name!r} outside of its own folder; don't trust it")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: not found, but {MANIFEST} names it; restore it or use an earlier step")
    files = {name: open_tensors(folder / name) for name in names}
    for of in entries.values():
        for e in of:
            if files[e["file"]].shapes.get(e["name"]) != tuple(e["size"]):
                raise ValueError(
                    f"{folder / e['file']}: {e['name']} is not the piece that {MANIFEST} describes; use an earlier step"
                )
    checked: set[tuple[str, str]] = set()

    def read(name: str, piece: Piece | Sequence[Piece] | None) -> Tensor:
        start, size = _box(shapes[name], piece)
        hits = [
            (e, hit) for e in entries[name] if (hit := _overlap((start, size), (tuple(e["start"]), tuple(e["size"])))) is not None
        ]
        if len(hits) == 1 and hits[0][1][1] == size:
            return _read_box(files[hits[0][0]["file"]], hits[0][0], hits[0][1], checked)
        result = torch.empty(size, dtype=_dtype(entries[name][0]["dtype"]))
        for e, hit in hits:
            inner = tuple(slice(a - b, a - b + n) for a, b, n in zip(hit[0], start, hit[1], strict=True))
            result[inner] = _read_box(files[e["file"]], e, hit, checked)
        return result

    return NativeTensors(folder, shapes, {n: _dtype(of[0]["dtype"]) for n, of in entries.items()}, read)


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
            _entry("model", file, name, reader.dtypes[name], reader.shapes[name], None, checksums[file][name])
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


def _entry(
    kind: str,
    file: str,
    name: str,
    dtype: torch.dtype,
    whole: tuple[int, ...],
    piece: Piece | Sequence[Piece] | None,
    crc32: int,
) -> Entry:
    start, size = _box(whole, piece)
    return {
        "kind": kind,
        "name": name,
        "dtype": dtype_name(dtype),
        "shape": list(whole),
        "start": list(start),
        "size": list(size),
        "file": file,
        "crc32": crc32,
    }


def _dtype(name: str) -> torch.dtype:
    more = {"float64": torch.float64, "int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8, "bool": torch.bool}
    known = {**DTYPES, **more}
    if name not in known:
        raise ValueError(f"{MANIFEST}: dtype {name!r} is not one of {', '.join(known)}")
    return known[name]


def _box(whole: tuple[int, ...], piece: Piece | Sequence[Piece] | None) -> Box:
    start, size = [0] * len(whole), list(whole)
    for dim, a, b in _pieces(piece):
        start[dim], size[dim] = a, b - a
    return tuple(start), tuple(size)


def _pieces(piece: Piece | Sequence[Piece] | None) -> Sequence[Piece]:
    if piece is None:
        return []
    return [cast(Piece, piece)] if isinstance(piece[0], int) else cast(Sequence[Piece], piece)


def _overlap(a: Box, b: Box) -> Box | None:
    start = tuple(max(x, y) for x, y in zip(a[0], b[0], strict=True))
    stop = tuple(min(x + n, y + m) for x, n, y, m in zip(*a, *b, strict=True))
    size = tuple(e - s for s, e in zip(start, stop, strict=True))
    return (start, size) if all(n > 0 for n in size) else None


def _check_cover(folder: Path, name: str, whole: tuple[int, ...], entries: list[Entry]) -> None:
    boxes = [(tuple(e["start"]), tuple(e["size"])) for e in entries]
    inside = all(s >= 0 and s + n <= w for start, size in boxes for s, n, w in zip(start, size, whole, strict=True))
    alike = len({(e["dtype"], tuple(e["shape"])) for e in entries}) == 1
    twice = any(_overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    elements = sum(torch.Size(size).numel() for _, size in boxes)
    if not inside or not alike or twice or elements != torch.Size(whole).numel():
        raise ValueError(
            f"{folder / MANIFEST}: the pieces of {name} hold {elements} of {torch.Size(whole).numel()} elements"
            f"{' and overlap' if twice else ''}; the checkpoint is incomplete, use an earlier step"
        )


def _read_box(file: TensorFile, entry: Entry, box: Box, checked: set[tuple[str, str]]) -> Tensor:
    """The box of the whole tensor out of the one piece that holds it; the piece's checksum is compared the first time."""
    key, name = (entry["file"], entry["name"]), entry["name"]
    local = [(dim, s - o, s - o + n) for dim, (s, o, n) in enumerate(zip(box[0], entry["start"], box[1], strict=True))]
    cuts = [(dim, a, b) for dim, a, b in local if b - a < entry["size"][dim]]
    if key in checked and len(cuts) == 1:
        return file.read(name, cuts[0])
    tensor = file.read(name, None)
    if key not in checked:
        if zlib.crc32(raw_bytes(tensor)) != entry["crc32"]:
            raise ValueError(
                f"{file.path}: {name} has another checksum than {MANIFEST} says; the file is damaged, use an earlier step"
            )
        checked.add(key)
    for dim, a, b in cuts:
        tensor = tensor.narrow(dim, a, b - a)
    return tensor
