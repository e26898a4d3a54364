"""Whatever a header says, opening the file ends with values that lie in it or with one sentence, soon and in little memory.

A format is one line of FORMATS. Valid files of it are changed at random, most where numbers stand, and opened; what is opened is
read to the last byte. The same is done once in a process of its own that may not take more memory than a few files have.
"""

from __future__ import annotations

import io
import pickletools
import random
import resource
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_makers import ORDERED_DICT, SIX, Call, Name, Storage, pickled, tensor, zip_of

from pyalpaca.checkpoint.container.gguf_file import gguf_layout, open_gguf_file
from pyalpaca.checkpoint.container.pickle_machine import Inert
from pyalpaca.checkpoint.container.safetensors_file import open_safetensors
from pyalpaca.checkpoint.container.tensor_file import TensorFile
from pyalpaca.checkpoint.container.torch_file import open_tensors, open_torch
from pyalpaca.data import indexed_writer, open_indexed


@dataclass(frozen=True)
class Format:
    """A kind of file.

    seeds: valid, small files. opened: gives the bytes of everything in a file; each must be a part of the file or of one beside.
    wrapped: what is changed may be a part of the file only, this makes the file. beside: {name: content} of files it needs.
    """

    name: str
    seeds: Callable[[], list[bytes]]
    opened: Callable[[Path], Iterable[bytes]]
    wrapped: Callable[[bytes], bytes] = bytes
    beside: Mapping[str, bytes] = field(default_factory=dict)


def tensor_bytes(tensor: Tensor) -> bytes:
    """Those of all its storage for a view of a file, and its own, which are read to see that they can be."""
    tensor.contiguous().reshape(-1).view(torch.uint8).sum()
    return bytes(tensor.untyped_storage())


def file_bytes(file: TensorFile) -> Iterable[bytes]:
    for name, shape in file.shapes.items():
        whole = file.read(name, None)
        assert (tuple(whole.shape), whole.dtype) == (shape, file.dtypes[name])
        if shape and shape[0]:
            assert tensor_bytes(file.read(name, (0, 0, 1)).clone()) == tensor_bytes(whole[:1].clone())
        yield tensor_bytes(whole)


def tree_bytes(tree: Any) -> Iterable[bytes]:
    if isinstance(tree, Tensor):
        yield tensor_bytes(tree)
    elif isinstance(tree, (dict, list, tuple, Inert)):
        for item in tree.state.values() if isinstance(tree, Inert) else tree.values() if isinstance(tree, dict) else tree:
            yield from tree_bytes(item)


def sequences(idx: Path) -> Iterable[bytes]:
    data = open_indexed(idx.with_suffix(""))
    assert all(0 <= document <= len(data) for document in data.documents)
    for i in range(len(data)):
        assert len(data[i]) == data.lengths[i]
        yield data[i].tobytes()


def saved(new: bool) -> list[bytes]:
    """Files of torch.save with views, ties, types of all kinds, and values between them."""
    base = torch.arange(12.0)
    trees: list[dict[str, Any]] = [
        {"w": base.reshape(3, 4), "t": base.reshape(3, 4).T, "e": torch.empty(0, 3), "h": torch.ones(3, dtype=torch.bfloat16)},
        {
            "model": torch.nn.Linear(2, 2).state_dict(),
            "iteration": 7,
            "betas": (0.9, 0.95),
            "size": torch.Size([2]),
            "names": {"a"},
        },
        {"p": torch.nn.Parameter(torch.ones(2)), "u": torch.arange(3).to(torch.uint16), "blob": b"\xff\x00", "big": 2**70},
    ]
    files = []
    for tree in trees:
        for protocol in (2, 4):
            file = io.BytesIO()
            torch.save(tree, file, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
            files.append(file.getvalue())
    return files


def pickles() -> list[bytes]:
    inert = Call(Name("megatron.core.enums", "ModelType"), (1,))
    return [
        pickled({"w": tensor(), "v": tensor(Storage(), 2, (2, 2), (2, 1)), "args": inert}),
        pickled({"w": Call(Name("torch._utils", "_rebuild_parameter"), (tensor(), False, Call(ORDERED_DICT, ())))}),
        pickled(
            {"w": tensor(Storage("1", 4, "HalfStorage"), 0, (4,), (1,)), "b": Call(Name("_codecs", "encode"), ("x", "latin1"))}
        ),
    ]


def safetensors_files() -> list[bytes]:
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "h": torch.ones(3, dtype=torch.bfloat16), "e": torch.empty(0, 2)}
    return [safetensors.torch.save(tensors, metadata={"format": "pt"}), safetensors.torch.save({"i": torch.arange(4)})]


def indexed(part: str) -> bytes:
    """One of the two files of a small data set."""
    with tempfile.TemporaryDirectory() as folder:
        with indexed_writer(Path(folder) / "x") as writer:
            for document in ([[1, 2, 3], [4]], [[5, 6]]):
                for sequence in document:
                    writer.add(sequence)
                writer.end_document()
        return (Path(folder) / f"x.{part}").read_bytes()


def in_zip(content: bytes) -> bytes:
    return zip_of(content, {"0": SIX, "1": bytes(8), "2": b""})


def gguf_files() -> list[bytes]:
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": np.uint32(1),
        "tokens": ["a", "b"],
        "scores": np.ones(2, "<f4"),
    }
    layout = gguf_layout("x.gguf", metadata, {"w": ((2, 3), "F32"), "h": ((5,), "F16"), "q": ((2, 32), "Q8_0")})
    content = bytearray(layout.size)
    for offset, patch in layout.seal(dict.fromkeys(layout.specs, 0)):
        content[offset : offset + len(patch)] = patch
    return [bytes(content)]


def gguf_bytes(path: Path) -> Iterable[bytes]:
    """Nothing but reads all: quantized tensors are not in the file as they come out."""
    for _ in file_bytes(open_gguf_file(path).tensors):
        yield b""


FORMATS = [
    Format("x.safetensors", safetensors_files, lambda path: file_bytes(open_safetensors(path))),
    Format("any.bin", lambda: [*safetensors_files(), *saved(True), *saved(False)], lambda path: file_bytes(open_tensors(path))),
    Format("zip.pt", lambda: saved(True), lambda path: tree_bytes(open_torch(path))),
    Format("legacy.pt", lambda: saved(False), lambda path: tree_bytes(open_torch(path))),
    Format("pickle.pt", pickles, lambda path: tree_bytes(open_torch(path)), wrapped=in_zip),
    Format("x.gguf", gguf_files, gguf_bytes),
    Format("x.idx", lambda: [indexed("idx")], sequences, beside={"x.bin": indexed("bin")}),
]

NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    8,
    24,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 4,
    2**63 - 1,
    2**64 - 1,
]
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


def changed(choose: random.Random, content: bytes) -> bytes:
    """Valid content with up to six things changed: a byte, a number, a piece moved or lost, an instruction of a pickle."""
    for _ in range(choose.choice([1, 1, 2, 6])):
        size = len(content)
        # Numbers stand at the beginning and at the end.
        place = min(
            size, choose.choice([choose.randrange(40), choose.randrange(size + 1), max(0, size - choose.randrange(1, 90))])
        )
        end = min(size, place + choose.choice([1, 2, 4, 8, choose.randrange(40)]))
        width = choose.choice([1, 2, 4, 8])
        number = (choose.choice(NUMBERS) % 256**width).to_bytes(width, choose.choice(["little", "big"]))
        new = choose.choice(
            [
                bytes([choose.randrange(256)]),
                number,
                number,
                content[place:end] * 2,
                content[choose.randrange(size + 1) :][: end - place],
                b"",
                choose.choice([b"-1", b"9" * choose.choice([1, 19, 400]), b"1e9", b"null", b"{", b'"w"', b"[]"]),
                choose.choice(OPCODES),
            ]
        )
        kept = place + len(new) if choose.random() < 0.7 else end if choose.random() < 0.9 else size
        content = content[:place] + new + content[kept:]
        if not content:
            return b"\0"
    return content


def program(choose: random.Random) -> bytes:
    """A pickle of instructions chosen at random, each with an argument of its kind, between those that make a tensor."""
    parts = [b"\x80\x04"]
    for _ in range(choose.randrange(1, 30)):
        opcode = choose.choice(pickletools.opcodes)
        kind, number = opcode.arg and opcode.arg.n, choose.choice(NUMBERS)
        text = choose.choice([b"w", b"storage", b"torch", b"FloatStorage", b"7", b"", b"\xff"])
        lengths = {-2: "<B", -3: "<i", -4: "<I", -5: "<Q"}
        argument = b""
        if kind is not None and kind > 0:
            argument = (number % 256**kind).to_bytes(kind, "little")
        elif kind == -1:
            argument = text + b"\n" + (b"OrderedDict\n" if opcode.name in ("GLOBAL", "INST") else b"")
        elif kind is not None:
            argument = struct.pack(lengths[kind], len(text) if choose.random() < 0.9 else number % 2**7) + text
        parts.append(opcode.code.encode("latin-1") + argument)
        if choose.random() < 0.2:
            parts.append(choose.choice([pickled(tensor())[2:-1], b"}", b"]", b"(", b")", b"}X\x01\x00\x00\x00wh\x00s"]))
    return b"".join(parts) + b"."


def check(kind: Format, content: bytes, folder: Path) -> bool:
    """Whether a file could be read, after all that is promised of it was seen to be kept."""
    content = kind.wrapped(content)
    for name, data in {kind.name: content, **kind.beside}.items():
        (folder / name).write_bytes(data)
    try:
        for part in kind.opened(folder / kind.name):
            assert part in content or any(part in data for data in kind.beside.values()), "this is not in the file"
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError)
        assert str(error).startswith(tuple(f"{folder / name}: " for name in (kind.name, *kind.beside)))
        assert str(error).isprintable()
        assert len(str(error)) < len(str(folder)) + 500
        return False
    return True


def ids(kind: Format) -> str:
    return kind.name


@pytest.mark.parametrize("kind", FORMATS, ids=ids)
def test_valid_files_are_read(kind: Format, tmp_path: Path) -> None:
    assert all(check(kind, content, tmp_path) for content in kind.seeds())


@pytest.mark.parametrize("kind", FORMATS, ids=ids)
def test_changed_files_are_read_or_refused(kind: Format, tmp_path: Path) -> None:
    seeds = kind.seeds()
    read = []

    @given(seed=st.sampled_from(seeds), choose=st.randoms(use_true_random=False))
    @settings(max_examples=300, deadline=5000, derandomize=True, database=None)
    def try_one(seed: bytes, choose: random.Random) -> None:
        read.append(check(kind, changed(choose, seed), tmp_path))

    try_one()
    assert 0 < sum(read) < len(read), "some changes do no harm, some do"


@given(choose=st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=5000, derandomize=True, database=None)
def test_pickles_of_random_instructions_are_read_or_refused(choose: random.Random) -> None:
    kind = next(kind for kind in FORMATS if kind.name == "pickle.pt")
    with tempfile.TemporaryDirectory() as folder:
        check(kind, program(choose), Path(folder))


SPARE = 64 << 20
"""Bytes that a process may take beyond what it has before the first file: the files have a few thousand."""


def main() -> None:
    """Open many changed files with hardly any memory left to take."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds = {kind.name: kind.seeds() for kind in FORMATS}
        for kind in FORMATS:
            check(kind, seeds[kind.name][0], folder)  # what is loaded once, is loaded now
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, used + SPARE))
        try:
            bytearray(2 * SPARE)
        except MemoryError:
            pass
        else:
            raise AssertionError("the limit does not hold")
        choose = random.Random(0)
        for kind in FORMATS:
            for _ in range(250):
                check(kind, changed(choose, choose.choice(seeds[kind.name])), folder)
            if kind.name == "pickle.pt":
                for _ in range(400):
                    check(kind, program(choose), folder)
    print("all were read or refused")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_no_header_makes_the_reader_take_memory() -> None:
    path = ":".join((str(Path(__file__).parent), *sys.path))
    env = {"PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"}  # another thread's arena alone would take all that is spare
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "all were read or refused\n", done.stderr


if __name__ == "__main__":
    main()
