"""torch.save's zip files, laid out before they are written: byte for byte torch's, with every tensor's place known in advance.

torch.save writes an uncompressed zip archive: `data.pkl` holds the tree, `data/N` the bytes of the N-th tensor, each record at a
multiple of 64 bytes thanks to a padding field `FB` in its header. What stands around them depends on torch's version:

| container   | written by         | records, in the file's order                                             | order of data/N |
|-------------|--------------------|--------------------------------------------------------------------------|-----------------|
| `torch2.7`  | torch 2.7 to 2.13  | data.pkl .format_version .storage_alignment byteorder data/N version +id | 0 1 2 .. 10     |
| `torch2.1`  | torch 2.1 to 2.6   | data.pkl byteorder data/N version +id                                    | 0 1 10 .. 2     |
| `torch1.13` | torch 1.13 and 2.0 | data.pkl data/N version                                                  | 0 1 10 .. 2     |

`+id` is `.data/serialization_id`, a hash of the records' names and checksums; what other platforms than Linux write differs here.
All records stand in a folder named after the file (`consolidated.00/`). Torch can be asked for other alignments and no checksums;
these are the defaults. Sources: torch/serialization.py, caffe2/serialize/inline_container.cc, third_party/miniz of PyTorch.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from pyalpaca.checkpoint.container.layout import FileLayout, Patch
from pyalpaca.checkpoint.container.tensor_file import Spec, dtype_name, spec_bytes


@dataclass(frozen=True)
class _Form:
    """What a range of torch versions writes around the tensors.

    head: {name: content} of the records between the pickle and the tensors.
    by_number: data/2 stands before data/10; else after it, as text is sorted.
    has_id: a serialization id ends the archive, and its folder is `archive` if the file's name is not ASCII.
    """

    head: Mapping[str, bytes]
    by_number: bool
    has_id: bool


_FORMS = {
    "torch2.7": _Form({".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little"}, True, True),
    "torch2.1": _Form({"byteorder": b"little"}, False, True),
    "torch1.13": _Form({}, False, False),
}
CONTAINERS = tuple(_FORMS)
"""The names of the forms, the newest first."""
DEFAULT_CONTAINER = CONTAINERS[0]

_STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
}
# Sizes that libstdc++'s hash table grows through: primes, each about twice the last.
_BUCKETS = (13, 29, 59, 127, 257, 541, 1109, 2357, 5087, 10273, 20753, 42043, 85229, 172933, 351061, 712697, 1447153)
_ID = ".data/serialization_id"
_ALIGNMENT = 64
_MAX32 = 2**32 - 1
_MASK64 = 2**64 - 1


def torch_layout(name: str, tree: Mapping[str, Any], container: str = DEFAULT_CONTAINER) -> FileLayout:
    """Where everything goes in the file that `torch.save(tree, name)` would write.

    tree: nested dicts whose leaves are Specs, each standing for a contiguous CPU tensor of its own, or plain values (None, bool,
    int, float, str, lists and tuples of them). A tensor's key in the layout is the way to it, joined by `/`; the keys of a flat
    dict stay as they are. Strings that are one object are written once, as torch does.
    container: one of CONTAINERS.
    Raises ValueError for an unknown container, a leaf or dtype that can't be written, and a name that is only a suffix.
    """
    if container not in _FORMS:
        raise ValueError(f"{name}: container {container!r} is unknown, expected one of {', '.join(CONTAINERS)}")
    form = _FORMS[container]
    root = _root(name, form)
    specs: dict[str, Spec] = {}
    content = io.BytesIO()
    _Pickler(content, protocol=2).dump(_with_tensors(name, tree, "", specs))
    keys = list(specs)
    order = sorted(range(len(keys)), key=None if form.by_number else str)
    parts: list[tuple[str, bytes | str]] = [("data.pkl", content.getvalue()), *form.head.items()]
    parts += [(f"data/{i}", keys[i]) for i in order]
    parts += [("version", b"3\n"), *([(_ID, bytes(40))] if form.has_id else [])]

    records: list[_Record] = []
    for record, value in parts:
        size = spec_bytes(specs[value]) if isinstance(value, str) else len(value)
        records.append(_Record(record, f"{root}/{record}".encode(), records[-1].end if records else 0, size, value))

    def seal(crcs: Mapping[str, int]) -> list[Patch]:
        return _seal(records, crcs)

    start, last = seal(dict.fromkeys(keys, 0))[-1]
    places = {record.value: record.start for record in records if isinstance(record.value, str)}
    return FileLayout(name, start + len(last), {key: specs[key] for key in places}, places, seal)


def _root(name: str, form: _Form) -> str:
    """The archive's folder: the file's name up to its last dot.

    `archive` instead if it is not ASCII, from torch 2.1 on. Torch looks at the whole path for that; here a file's bytes do not
    depend on the folder it is in.
    """
    base = name.replace("\\", "/").rpartition("/")[2]
    root = base.rpartition(".")[0] if "." in base else base
    if not root:
        raise ValueError(f"{name}: has nothing before its suffix, expected a name like model.pth; choose another")
    return root if root.isascii() or not form.has_id else "archive"


# The tree, pickled by the standard pickler as torch.save has it do: what stands for a tensor reduces to torch's own call.


@dataclass(frozen=True)
class _Storage:
    """Stands for the storage of the `number`-th tensor."""

    number: int
    spec: Spec


@dataclass(frozen=True)
class _Tensor:
    """Stands for a tensor with a storage of its own."""

    storage: _Storage

    def __reduce__(self) -> tuple[Any, ...]:
        tensor = torch.empty(self.storage.spec[0], device="meta")
        # Each a new tuple: the pickler would write a shape that two tensors share only once.
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, tuple(tensor.size()), tensor.stride(), False, OrderedDict())


class _Pickler(pickle.Pickler):
    """The standard pickler, which asks here what is kept outside of the pickle."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        shape, dtype = obj.spec
        return ("storage", getattr(torch, _STORAGES[dtype]), str(obj.number), "cpu", torch.Size(shape).numel())


def _with_tensors(name: str, tree: Mapping[str, Any], way: str, specs: dict[str, Spec]) -> dict[str, Any]:
    """A copy of the tree with a _Tensor for every Spec, which goes into `specs` under its key."""
    copy: dict[str, Any] = {}
    for key, value in tree.items():
        path = way + key
        if isinstance(value, Mapping):
            copy[key] = _with_tensors(name, value, path + "/", specs)
        elif _is_spec(value):
            assert path not in specs, f"{name}: two tensors are called {path}"
            if value[1] not in _STORAGES:
                known = ", ".join(map(dtype_name, _STORAGES))
                raise ValueError(f"{name}: {path} is {dtype_name(value[1])}, expected one of {known}; cast it")
            copy[key] = _Tensor(_Storage(len(specs), value))
            specs[path] = value
        elif _is_plain(value):
            copy[key] = value
        else:
            raise ValueError(f"{name}: {path} is a {type(value).__name__}, expected a tensor or a plain value; leave it out")
    return copy


def _is_spec(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.dtype)


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in (type(None), bool, int, float, str)


# The archive as miniz writes it: all in zip64 form at its end, but zip64 fields for a record only where 32 bits do not do.


@dataclass(frozen=True)
class _Record:
    """One file of the archive.

    name, path: without and with the archive's folder.
    offset: of its header; the data, `size` bytes, are at `start`, and `end` is where the next record begins.
    value: the content, or the key of the tensor that is its content.
    """

    name: str
    path: bytes
    offset: int
    size: int
    value: bytes | str

    @property
    def start(self) -> int:
        return self.offset + len(self.header)

    @property
    def end(self) -> int:
        return self.start + self.size + len(self.descriptor(0))

    @property
    def flags(self) -> int:
        """UTF-8 names; sizes follow the data, unless there are none."""
        return 0x0808 if self.size else 0x0800

    @property
    def header(self) -> bytes:
        extra = self.zip64(compressed_size=0)  # not known yet when miniz writes this
        before = self.offset + 30 + len(self.path) + len(extra) + 4
        padding = -before % _ALIGNMENT
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        fields = (b"PK\3\4", 0, self.flags, 0, 0, 0, 0, 0, 0, len(self.path), len(extra))
        return struct.pack("<4s5H3I2H", *fields) + self.path + extra

    def zip64(self, compressed_size: int) -> bytes:
        """The extra field for what does not fit 32 bits; empty if all does."""
        numbers = [self.size, compressed_size] if self.size >= _MAX32 else []
        if self.offset >= _MAX32:
            numbers.append(self.offset)
        return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""

    def descriptor(self, crc: int) -> bytes:
        """What follows the data: their checksum and size."""
        if not self.size:
            return b""
        return struct.pack("<4sI2Q" if self.zip64(0) else "<4s3I", b"PK\7\x08", crc, self.size, self.size)

    def entry(self, crc: int) -> bytes:
        """Its line in the directory at the end."""
        extra, size = self.zip64(self.size), min(self.size, _MAX32)
        fields = (0, 0, self.flags, 0, 0, 0, crc, size, size, len(self.path), len(extra), 0, 0, 0, 0, min(self.offset, _MAX32))
        return struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields) + self.path + extra


def _seal(records: Sequence[_Record], crcs: Mapping[str, int]) -> list[Patch]:
    """All bytes of the archive that are not of tensors, given {key: crc32 of the tensor's bytes}."""
    patches: list[Patch] = []
    start, gap, directory, data_hash = 0, b"", b"", 0
    for record in records:
        gap += record.header
        if isinstance(record.value, str):
            crc = crcs[record.value] if record.size else 0
            patches.append((start, gap))
            start, gap = record.start + record.size, b""
        else:
            content = record.value
            if record.name == _ID:
                content = f"{_names_hash([r.name for r in records[:-1]]):020}{data_hash:020}".encode()
            crc = zlib.crc32(content)
            gap += content
        gap += record.descriptor(crc)
        directory += record.entry(crc)
        if record.size:  # torch also counts a tensor that begins with b"PK\7\x08", taking it for a descriptor; this does not
            data_hash = _combined(data_hash, crc)
    at, size, count = start + len(gap), len(directory), len(records)
    gap += directory
    gap += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 0x002D, 0, 0, count, count, size, at)
    gap += struct.pack("<4sIQI", b"PK\6\7", 0, at + size, 1)
    gap += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *[min(count, 0xFFFF)] * 2, min(size, _MAX32), min(at, _MAX32), 0)
    return [*patches, (start, gap)]


# The serialization id hashes the names in the order in which libstdc++'s unordered_set<string> happens to hold them.


def _combined(seed: int, value: int) -> int:
    """c10::hash_combine, which is Boost's."""
    return seed ^ ((value + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & _MASK64)


def _names_hash(names: Sequence[str]) -> int:
    """All names' hashes combined in the order of a std::unordered_set that they were put into one by one.

    That is a list of buckets, the newest first, each a list of hashes, the newest first. When it is full, the next larger number
    of buckets is taken and all hashes put in anew, in the order they had.
    """
    sizes = iter(_BUCKETS)
    size = next(sizes)
    buckets: dict[int, list[int]] = {}
    for count, name in enumerate(names):
        again: list[int] = []
        if count == size:
            size, again, buckets = next(sizes), _in_order(buckets), {}
        for value in (*again, _murmur(name.encode())):
            buckets.setdefault(value % size, []).append(value)
    return reduce(_combined, _in_order(buckets), 0)


def _in_order(buckets: Mapping[int, list[int]]) -> list[int]:
    return [value for bucket in reversed(list(buckets.values())) for value in reversed(bucket)]


def _murmur(text: bytes) -> int:
    """libstdc++'s std::hash of a string: MurmurHash2 in 64 bits."""
    factor = 0xC6A4A7935BD1E995
    result = 0xC70F6907 ^ len(text) * factor & _MASK64
    whole = len(text) // 8 * 8
    for at in range(0, whole, 8):
        block = int.from_bytes(text[at : at + 8], "little") * factor & _MASK64
        result = (result ^ (block ^ block >> 47) * factor & _MASK64) * factor & _MASK64
    if text[whole:]:
        result = (result ^ int.from_bytes(text[whole:], "little")) * factor & _MASK64
    result = (result ^ result >> 47) * factor & _MASK64
    return result ^ result >> 47
