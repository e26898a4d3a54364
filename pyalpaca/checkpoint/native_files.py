"""The files of one native checkpoint: `manifest.json` and safetensors shards, one for each rank that writes.

A shard holds boxes of whole tensors (a tensor-parallel piece, an optimizer's share of it); the manifest says where each box lies.
So a checkpoint written by one layout of ranks is read by any other. No torch.distributed here: each rank calls
`write_native_shard`, the lists it returns are gathered, and one rank calls `write_native_manifest`.

Each tensor has a checksum in the manifest, and so has the manifest itself (version 2; version 1 had none).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pyalpaca.checkpoint.canonical import DTYPES, own
from pyalpaca.checkpoint.container.safetensors_file import safetensors_layout
from pyalpaca.checkpoint.container.tensor_file import Piece, TensorFile, dtype_name, raw_bytes, read_json
from pyalpaca.checkpoint.container.torch_file import open_tensors
from pyalpaca.checkpoint.plan import write_file
from pyalpaca.files import atomic_file
from pyalpaca.model import LlamaConfig, natural_key

MANIFEST = "manifest.json"
_CHECKSUM = ', "crc32": '
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(start of each dimension, size of each dimension)."""
Entry = dict[str, Any]
Shard = Mapping[str, tuple[Tensor, tuple[int, ...], Piece | Sequence[Piece] | None]]


class DamagedError(ValueError):
    """A native checkpoint, or a part of it, is not what was written."""


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
        entries.append(manifest_entry(kind, file, name, tensor.dtype, whole, piece, zlib.crc32(raw_bytes(data[name]))))
    layout = safetensors_layout(file, {n: (tuple(t.shape), t.dtype) for n, t in data.items()})
    write_file(layout, folder / file, data)
    return entries


def write_native_manifest(folder: Path, config: LlamaConfig, entries: Iterable[Entry], meta: Mapping[str, Any]) -> None:
    """Write the manifest over all shards' entries. `meta` is what the run wants back: step, data position, loss scale, ..."""
    fields = {"format": "pyalpaca", "version": 2, "config": asdict(config), "meta": dict(meta)}
    lines = ",\n".join(json.dumps(entry) for entry in entries)  # one line each: readable, and short for thousands
    with atomic_file(folder / MANIFEST) as partial:
        text = f'{json.dumps(fields)[:-1]}, "tensors": [\n{lines}\n]'
        partial.write_text(f"{text}{_CHECKSUM}{zlib.crc32(text.encode())}}}\n", encoding="utf-8")


@contextmanager
def _as_damage() -> Iterator[None]:
    """What a reader of files raises of a file that it can't read."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise DamagedError(str(error)) from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The fields of a checkpoint's manifest, checked; DamagedError says what is wrong with it."""
    with _as_damage():
        fields = read_json(folder / MANIFEST)
    if fields.get("format") != "pyalpaca" or fields.get("version") not in (1, 2):
        raise DamagedError(
            f"{folder / MANIFEST}: format {fields.get('format')!r} version {fields.get('version')!r}, expected pyalpaca 2"
        )
    keys = {"kind", "name", "dtype", "shape", "start", "size", "file", "crc32"}
    kinds = {"config": dict, "meta": dict, "tensors": list}
    whole = all(isinstance(fields.get(key), kind) for key, kind in kinds.items())
    if not whole or not all(isinstance(entry, dict) and set(entry) >= keys for entry in fields["tensors"]):
        raise DamagedError(f"{folder / MANIFEST}: is incomplete, expected config, meta and tensors")
    data = (folder / MANIFEST).read_bytes()
    if fields["version"] == 2 and fields.get("crc32") != zlib.crc32(data[: data.rfind(_CHECKSUM.encode())]):
        raise DamagedError(f"{folder / MANIFEST}: has another checksum than it says, so it was changed after it was written")
    return fields


def read_native_files(folder: Path, kind: str) -> NativeTensors:
    """The tensors of one kind; DamagedError says what is wrong with the files, or later with the piece that is read."""
    fields = read_manifest(folder)
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
            raise DamagedError(f"{folder / MANIFEST}: names the file {name!r} outside of its own folder, don't trust it")
        if not (folder / name).is_file():
            raise DamagedError(f"{folder / name}: not found, but {MANIFEST} names it")
    with _as_damage():
        files = {name: open_tensors(folder / name) for name in names}
    for of in entries.values():
        for e in of:
            file = files[e["file"]]
            if file.shapes.get(e["name"]) != tuple(e["size"]) or file.dtypes[e["name"]] != _dtype(e["dtype"]):
                raise DamagedError(f"{folder / e['file']}: {e['name']} is not the piece that {MANIFEST} describes")
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


def manifest_entry(
    kind: str,
    file: str,
    name: str,
    dtype: torch.dtype,
    whole: tuple[int, ...],
    piece: Piece | Sequence[Piece] | None,
    crc32: int,
) -> Entry:
    """What the manifest says of one piece; crc32: of its bytes."""
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
        raise DamagedError(
            f"{folder / MANIFEST}: the pieces of {name} hold {elements} of {torch.Size(whole).numel()} elements"
            f"{' and overlap' if twice else ''}"
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
            raise DamagedError(f"{file.path}: {name} has another checksum than {MANIFEST} says, so the file is damaged")
        checked.add(key)
    for dim, a, b in cuts:
        tensor = tensor.narrow(dim, a, b - a)
    return tensor
