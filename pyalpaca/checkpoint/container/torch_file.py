"""Files written by torch.save, opened without running anything: tensors are views of the mapped file.

Since torch 1.6 a file is a zip archive: ROOT/data.pkl is the pickle, ROOT/data/KEY the bytes of a storage, uncompressed.
Before, it was three small pickles (a magic number, a version, the writer's system), the pickle, a pickle of the storages' keys in
the order of their data, and for each an element count (u64) and its bytes, little-endian and unaligned.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyalpaca.checkpoint.container.pickle_machine import Inert, UntrustedError
from pyalpaca.checkpoint.container.safetensors_file import open_safetensors
from pyalpaca.checkpoint.container.tensor_file import Piece, TensorFile, check_head
from pyalpaca.checkpoint.container.torch_names import Build, StorageRef, storage_ref, torch_names
from pyalpaca.checkpoint.container.tree import shown
from pyalpaca.checkpoint.container.unpickle import MAX_PICKLE, unpickle

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_MAX_DIRECTORY = 1 << 24
"""Bytes of the largest table of a zip archive that is read: some 200,000 storages."""

_MAX_EXPANDED = 1 << 24
"""Bytes that a tensor may have beyond those of its file: strides of 0 show one number many times over."""

Locate = Callable[[StorageRef], tuple[int, int]]
"""storage -> (offset of its data in the file, bytes)."""


def open_tensors(path: Path) -> TensorFile:
    """Open a safetensors file or one written by torch.save, whatever its name says.

    ValueError or FileNotFoundError says what is wrong with it.
    """
    check_head(path, "a file of tensors (safetensors or written by torch.save)")
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file begins with the length of a JSON object, in eight bytes of any value.
    if head[8:] == b"{" or (path.suffix == ".safetensors" and not head.startswith((b"PK\x03\x04", b"\x80"))):
        return open_safetensors(path)
    return open_torch_tensors(path)


def open_torch_tensors(path: Path) -> TensorFile:
    """The tensors at the top level of a file written by torch.save; ValueError or FileNotFoundError if it can't be read."""
    tensors = {key: value for key, value in open_torch(path).items() if isinstance(value, Tensor)}
    for key in tensors:
        if not isinstance(key, str):
            raise ValueError(f"{path}: has a tensor under {key!r}, expected names; save it under a name")

    def read(name: str, piece: Piece | None) -> Tensor:
        tensor = tensors[name]
        return tensor if piece is None else tensor.narrow(piece[0], piece[1], piece[2] - piece[1])

    return TensorFile(path, {key: tuple(t.shape) for key, t in tensors.items()}, {k: t.dtype for k, t in tensors.items()}, read)


def open_torch(path: Path) -> dict[Any, Any]:
    """What torch.save wrote: nested dicts, lists and plain values, with tensors that are views of the mapped file.

    Objects of training programs (arguments, random states, enums) are `Inert` records. Tensors that shared a storage share it
    here, and changing one in place does not change the file. ValueError or FileNotFoundError says what is wrong.
    """
    check_head(path, "a file written by torch.save")
    data = _map(path)
    try:
        if data[:4] == b"PK\x03\x04":
            content = _read_zip(path, data)
        elif data[257:262] == b"ustar":
            _refuse("is in the tar format of torch before 0.1.10; load it with that torch and save it again with a newer one")
        else:
            content = _read_legacy(path, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if isinstance(content, Inert):
        raise ValueError(f"{path}: holds a `{shown(content.name)}`, expected a dict of tensors; save its state_dict instead")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors; save them under names")
    return content


def _refuse(reason: str) -> NoReturn:
    """The end of a sentence that begins with the file's path."""
    raise ValueError(reason)


def _map(path: Path) -> mmap.mmap:
    """The file in memory, private to this process and writable there: torch has no read-only tensors.

    Without a reserve, so that files larger than the memory can be opened: pages that are only read need none.
    """
    with path.open("rb") as file:
        try:
            if sys.platform != "linux":
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            no_reserve = 0x4000  # mmap.MAP_NORESERVE since Python 3.13
            return mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | no_reserve, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:  # mmap does not know the name
            raise OSError(error.errno, error.strerror, str(path)) from None


def _views(data: mmap.mmap, locate: Locate) -> Build:
    """A maker of tensors that are views of `data`. It checks all numbers and takes no memory that depends on them."""
    bases: dict[tuple[int, torch.dtype], Tensor] = {}
    largest = max(len(data), _MAX_EXPANDED)

    def build(ref: StorageRef, dtype: torch.dtype, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        place, size = locate(ref)
        if size // ref.dtype.itemsize != ref.count:
            _refuse(f"has {size:,} bytes for {ref.count:,} elements of {ref.dtype} in storage {shown(ref.key)}; it is damaged")
        start, stop = (n * ref.dtype.itemsize // dtype.itemsize for n in (ref.start, ref.stop))
        wish = _unmet(offset, shape, strides, stop - start, largest // dtype.itemsize)
        if wish:
            _refuse(
                f"has a tensor of shape {_numbers(shape)}, strides {_numbers(strides)} and offset {_numbers((offset,))}, "
                f"expected {wish}; it is damaged"
            )
        base = bases.get((place, dtype))
        if base is None:
            elements = size // dtype.itemsize
            base = torch.frombuffer(data, dtype=dtype, count=elements, offset=place) if elements else torch.empty(0, dtype=dtype)
            bases[place, dtype] = base
        return base.as_strided(shape, strides, start + offset)

    return build


def _unmet(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], elements: int, most: int) -> str | None:
    """What a view of a storage of `elements` elements should have been, or None if it is; `most` elements may be shown."""
    numbers = (offset, *shape[:65], *strides[:65])
    if len(shape) != len(strides) or len(shape) > 64:
        return "as many strides as dimensions, at most 64"
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        return "numbers from 0"
    count = math.prod(shape)
    if count == 0:
        # What an empty tensor says beside its shape does not matter, but torch counts with it.
        return None if max(math.prod(max(n, 1) for n in shape), offset, *strides) < 1 << 56 else "dimensions that can be counted"
    if offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) >= elements:
        return f"a view within the {elements:,} elements of its storage"
    if count > most:
        return f"at most the {most:,} elements that fit in the file"
    return None


def _numbers(numbers: tuple[Any, ...]) -> str:
    return shown(f"[{', '.join(str(n) if type(n) is int and abs(n) < 1 << 64 else '?' for n in numbers[:64])}]")


class _DirectoryFile(io.FileIO):
    """A file from which `zipfile` reads the table of an archive: the table says itself how long it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its table has {size:,} bytes")
        return super().read(size)


def _read_zip(path: Path, data: mmap.mmap) -> Any:
    members = _members(path, data)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if not pickles:
        names = shown(", ".join(list(members)[:4]))
        _refuse(
            f"is a zip archive without data.pkl, but with {names or 'nothing'}; expected a file written by torch.save; unpack it"
        )
    root = pickles[0].removesuffix("data.pkl")
    if len(pickles) > 1:
        _refuse("has several data.pkl, expected one; don't trust this file")
    if root + "constants.pkl" in members or any(name.startswith(root + "code/") for name in members):
        _refuse("is a TorchScript program, expected tensors; load it with torch.jit.load and save its state_dict")

    def content(name: str, limit: int) -> bytes:
        offset, size = _place(data, members, root + name)
        if size > limit:
            _refuse(f"has a {name} of {size:,} bytes, expected at most {limit:,}; it is damaged")
        return data[offset : offset + size]

    byte_order = content("byteorder", 16) if root + "byteorder" in members else b"little"
    if byte_order == b"big":
        _refuse("was written on a big-endian machine, expected little-endian; load it there or with torch and save it again here")
    if byte_order != b"little":
        _refuse(f"has the byte order {byte_order!r}, expected little; it is damaged")
    pickle = content("data.pkl", MAX_PICKLE)
    checksum = members[pickles[0]][0].CRC
    if checksum not in (0, zlib.crc32(pickle)):  # torch can be told not to compute it
        _refuse("has a data.pkl that does not fit its checksum; it is damaged, download it again")
    build = _views(data, lambda ref: _place(data, members, f"{root}data/{ref.key}"))
    return unpickle(io.BytesIO(pickle), torch_names(build), storage_ref)


_Members = dict[str, tuple[zipfile.ZipInfo, int]]
"""name -> (its entry in the table, where the next member or the table begins)."""


def _members(path: Path, data: mmap.mmap) -> _Members:
    """The table of a zip archive."""
    end = data.rfind(b"PK\x05\x06", max(0, len(data) - (1 << 16) - 22))
    if end < 0 or end + 22 > len(data):
        _refuse(f"is truncated ({len(data):,} bytes, the end of the archive is missing); download it again")
    try:
        with _DirectoryFile(path) as file, zipfile.ZipFile(file) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            ends = [*(entry.header_offset for entry in entries[1:]), archive.start_dir]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError, struct.error) as error:
        _refuse(f"has a damaged zip table ({shown(str(error))}; the file has {len(data):,} bytes); download it again")
    members = {entry.filename: (entry, end) for entry, end in zip(entries, ends, strict=True)}
    if len(members) != len(entries):
        _refuse("has two members of one name in its zip table; don't trust this file")
    return members


def _place(data: mmap.mmap, members: _Members, name: str) -> tuple[int, int]:
    """(offset, bytes) of a member's data, which lie in the file and in no other member."""
    if name not in members:
        _refuse(f"has no {shown(name)}, which it needs; it is damaged, download it again")
    entry, end = members[name]
    if entry.flag_bits & 1 or entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        _refuse(f"has {shown(name)} compressed or encrypted, which torch.save never does; unpack it and pack it with `zip -0 -r`")
    head = data[entry.header_offset : entry.header_offset + 30] if 0 <= entry.header_offset < len(data) else b""
    stored = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
    length, extra = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
    begin = entry.header_offset + 30
    offset = begin + length + extra
    if head[:4] != b"PK\x03\x04" or data[begin : begin + length] != stored or offset + entry.file_size > min(end, len(data)):
        _refuse(f"has {shown(name)} at another place than its zip table says, or cut off; it is damaged, download it again")
    return offset, entry.file_size


def _read_legacy(path: Path, data: mmap.mmap) -> Any:
    with path.open("rb") as file:
        # Only what may be pickles: what a pickle says of its lengths is bounded by this.
        head = mmap.mmap(file.fileno(), min(len(data), MAX_PICKLE), access=mmap.ACCESS_READ)
    names = torch_names(lambda *_: _refuse("has tensors where torch.save has none; it is damaged"))
    try:
        magic = unpickle(head, names)
    except UntrustedError:
        raise
    except ValueError:
        if data[:1] == b"\x80":
            raise
        _refuse(
            f"can't be read as tensors saved by torch.save (it begins with {data[:8]!r}); check the path, or download it again"
        )
    if type(magic) is not int or magic != _MAGIC:
        _refuse("is a pickle, but not of torch.save, expected tensors; load it where it comes from and save it with torch.save")
    version, system = unpickle(head, names), unpickle(head, names)
    if type(version) is not int or version != _VERSION or not isinstance(system, dict):
        _refuse(f"has another version than {_VERSION} of torch's format; it is damaged")

    begin = head.tell()
    refs: dict[str, StorageRef] = {}

    def note(persistent_id: Any) -> StorageRef:
        ref = storage_ref(persistent_id)
        return refs.setdefault(ref.key, ref)

    # Where the storages lie is known once the pickle was read to its end: it is read twice.
    unpickle(head, torch_names(lambda *_: torch.empty(0)), note)
    places = _legacy_places(data, refs, unpickle(head, names), head.tell())
    head.seek(begin)
    return unpickle(head, torch_names(_views(data, lambda ref: places[ref.key])), storage_ref)


def _legacy_places(data: mmap.mmap, refs: dict[str, StorageRef], keys: Any, at: int) -> dict[str, tuple[int, int]]:
    """{key: (offset, bytes)} of the storages that begin at `at`, in the order of `keys`."""
    places: dict[str, tuple[int, int]] = {}
    for key in keys if isinstance(keys, list) else ():
        ref = refs.get(key) if isinstance(key, str) else None
        if ref is None or key in places:
            _refuse("lists storages that its pickle does not refer to, or one twice; it is damaged")
        size = ref.count * ref.dtype.itemsize
        if at + 8 + size > len(data):
            _refuse(f"is truncated ({len(data):,} bytes found, at least {at + 8 + size:,} expected); download it again")
        if int.from_bytes(data[at : at + 8], "little") != ref.count:
            _refuse(f"has another number of elements in storage {shown(key)} than its pickle says; it is damaged")
        places[key] = (at + 8, size)
        at += 8 + size
    if len(places) != len(refs):
        _refuse(f"has the data of {len(places)} storages, expected {len(refs)}; it is damaged")
    return places
