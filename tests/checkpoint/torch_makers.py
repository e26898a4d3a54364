"""Files as torch.save, an attacker or a bad disk would make them: pickles put together by hand, and zip archives around them."""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Name:
    """`module.name` in a pickle, by any way to write it."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """What REDUCE would call."""

    function: Any
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Storage:
    """A storage as torch.save refers to it."""

    key: Any = "0"
    count: Any = 6
    kind: str = "FloatStorage"
    more: tuple[Any, ...] = ()


def steps(value: Any) -> bytes:
    """The instructions that push a value, of protocol 2."""
    if isinstance(value, Name):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        return steps(value.function) + steps(value.args) + b"R"
    if isinstance(value, Storage):
        return steps(("storage", Name("torch", value.kind), value.key, "cpu", value.count, *value.more)) + b"Q"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(steps, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(steps, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(steps(key) + steps(item) for key, item in value.items()) + b"u"
    return pickle.dumps(value, 2)[2:-1]


def pickled(value: Any) -> bytes:
    """A whole pickle of protocol 2."""
    return b"\x80\x02" + steps(value) + b"."


def tensor(storage: Any = Storage(), offset: Any = 0, shape: Any = (2, 3), strides: Any = (3, 1), *more: Any) -> Call:
    """A tensor as torch.save writes it, with any numbers."""
    return Call(
        Name("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, strides, False, Call(ORDERED_DICT, ()), *more)
    )


ORDERED_DICT = Name("collections", "OrderedDict")
SIX = bytes(range(24))
"""The data of a storage of six 32-bit numbers."""


def zip_of(content: bytes, storages: dict[str, bytes] | None = None, root: str = "archive", **more: bytes) -> bytes:
    """A zip archive around a pickle, with further members `more`; its data are aligned to nothing."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{root}/data.pkl", content)
        for key, data in ({"0": SIX} if storages is None else storages).items():
            archive.writestr(f"{root}/data/{key}", data)
        for name, data in more.items():
            archive.writestr(f"{root}/{name}", data)
    return file.getvalue()


def legacy_of(content: bytes, keys: Any, data: bytes, little_endian: bool = True) -> bytes:
    """A file as torch before 1.6 wrote it: `content` is the pickle, `data` all that comes behind the pickle of the keys."""
    system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system))
    return head + content + pickle.dumps(keys, 2) + data


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
