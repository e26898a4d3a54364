"""The indexed data set of Megatron (`mmap`): PREFIX.bin holds all tokens back to back, PREFIX.idx says where each sequence lies.

PREFIX.idx, little-endian: "MMIDIDX\\0\\0" | u64 version 1 | u8 dtype | u64 sequences | u64 document starts | int32 length of
each sequence | int64 byte offset of each sequence | int64 first sequence of each document, with a last one past the end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pyalpaca.files import atomic_file

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")

# Codes 6 and 7 are exchanged in newer writers: the reader tells them apart by the size of PREFIX.bin.
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name).newbyteorder("<") for code, name in enumerate(("u1", "i1", "i2", "i4", "i8", "f4", "f8", "u2"), start=1)
}


@dataclass(frozen=True)
class IndexedDataset:
    """Sequences of tokens in a memory-mapped file: `data[i]` is sequence i, (length,) of `dtype`; nothing is read before."""

    prefix: Path
    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]
    tokens: npt.NDArray[Any] = field(repr=False)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        start = int(self.offsets[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def open_indexed(prefix: str | Path) -> IndexedDataset:
    """Open PREFIX.idx and PREFIX.bin and check that they fit each other.

    FileNotFoundError or ValueError: a file is missing, is not such a file, is cut off, or the two are not of one data set.
    """
    idx, bin_ = idx_path(prefix), bin_path(prefix)
    for file in (idx, bin_):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, expected a prepared data set; make it with tools/preprocess_data.py")
    size, bin_size = idx.stat().st_size, bin_.stat().st_size
    with idx.open("rb") as stream:
        head = stream.read(_HEADER.size)
    if not head.startswith(_MAGIC):
        raise ValueError(f"{idx}: begins with {head[:9]!r}, expected {_MAGIC!r}; it is no mmap index, prepare the data again")
    if len(head) < _HEADER.size:
        raise ValueError(
            f"{idx}: has {size} bytes, expected at least {_HEADER.size}; the file is cut off, prepare the data again"
        )
    _, version, code, sequences, starts = _HEADER.unpack(head)
    if version != 1:
        raise ValueError(f"{idx}: has version {version}, expected 1; prepare the data again")
    if code not in DTYPES:
        raise ValueError(f"{idx}: has dtype code {code}, expected 1 to 8; the file is damaged, prepare the data again")
    expected = _HEADER.size + 12 * sequences + 8 * starts
    if size != expected:
        raise ValueError(
            f"{idx}: has {size:,} bytes, expected {expected:,} for {sequences:,} sequences and {starts:,} document starts; "
            "the file is damaged, prepare the data again"
        )
    raw = np.memmap(idx, dtype=np.uint8, mode="r")[_HEADER.size :]
    lengths = raw[: 4 * sequences].view("<i4")
    offsets = raw[4 * sequences : 12 * sequences].view("<i8")
    documents = raw[12 * sequences :].view("<i8")
    dtype = _resolve(code, lengths, bin_size)
    total = int(lengths.sum(dtype=np.int64)) * dtype.itemsize
    if bin_size != total:
        raise ValueError(
            f"{bin_}: has {bin_size:,} bytes, expected {total:,} as {idx.name} says; the file is cut off or of another data set, "
            "prepare the data again"
        )
    # Offsets are compared on their own: one near the largest number would make an end that is negative.
    ends = offsets + lengths.astype(np.int64) * dtype.itemsize
    outside = sequences and (lengths.min() < 0 or offsets.min() < 0 or offsets.max() > total or ends.max() > total)
    if outside or (offsets % dtype.itemsize).any():
        raise ValueError(f"{idx}: has sequences that lie outside {bin_.name}; the file is damaged, prepare the data again")
    if starts and (documents.min() < 0 or documents.max() > sequences or (np.diff(documents) < 0).any()):
        raise ValueError(
            f"{idx}: has documents that begin at no sequence from 0 to {sequences:,}, or not in order; the file is damaged, "
            "prepare the data again"
        )
    tokens: npt.NDArray[Any] = np.memmap(bin_, dtype=dtype, mode="r") if total else np.empty(0, dtype)
    return IndexedDataset(Path(prefix), dtype, lengths, offsets, documents, tokens)


def _resolve(code: int, lengths: npt.NDArray[np.int32], bin_size: int) -> np.dtype[Any]:
    """The dtype of a code, for the two floating-point codes by the size of the tokens."""
    other = {6: 7, 7: 6}.get(code, code)
    count = int(lengths.sum(dtype=np.int64))
    return DTYPES[other] if count * DTYPES[other].itemsize == bin_size else DTYPES[code]


class IndexedWriter:
    """Appends sequences and documents; made by `indexed_writer`."""

    def __init__(self, stream: IO[bytes], dtype: np.dtype[Any], prefix: str | Path) -> None:
        self._stream = stream
        self._dtype = dtype
        self._prefix = prefix
        self.lengths: list[int] = []
        self.documents: list[int] = [0]

    def add(self, sequence: Sequence[int] | npt.NDArray[Any]) -> None:
        """Append one sequence, (length,). ValueError if a value does not fit the dtype."""
        values = np.asarray(sequence)
        array = values.astype(self._dtype, copy=False)
        if self._dtype.kind != "f" and values.dtype != self._dtype and not np.array_equal(array, values):
            raise ValueError(
                f"{self._prefix}: sequence {len(self.lengths)} holds values from {values.min()} to {values.max()}, "
                f"which {self._dtype} cannot hold; choose a wider dtype"
            )
        self._stream.write(array.tobytes())
        self.lengths.append(len(array))

    def end_document(self) -> None:
        """End the document that the sequences added since the last call form."""
        self.documents.append(len(self.lengths))


@contextmanager
def indexed_writer(prefix: str | Path, dtype: npt.DTypeLike = np.int32) -> Iterator[IndexedWriter]:
    """Yield a writer of PREFIX.bin and PREFIX.idx; both appear when the block ends well, neither if it raises.

    Sequences go to the disk as they come: memory is a few bytes a sequence. ValueError for a dtype without a code.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    code = next((code for code, known in DTYPES.items() if known == kind), None)
    if code is None:
        raise ValueError(
            f"{prefix}: dtype {kind} has no code in this format, expected one of {[str(d) for d in DTYPES.values()]}"
        )
    with atomic_file(idx_path(prefix)) as idx, atomic_file(bin_path(prefix)) as bin_:
        with bin_.open("wb") as stream:
            writer = IndexedWriter(stream, kind, prefix)
            yield writer
        if writer.documents[-1] != len(writer.lengths):
            writer.end_document()
        _write_index(idx, code, writer, kind.itemsize)


def _write_index(path: Path, code: int, writer: IndexedWriter, itemsize: int) -> None:
    lengths = np.asarray(writer.lengths, dtype="<i4")
    offsets = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1].astype(np.int64) * itemsize, out=offsets[1:])
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(writer.documents)))
        for array in (lengths, offsets, np.asarray(writer.documents, dtype="<i8")):
            stream.write(array.tobytes())
