"""Prepared data to batches: a batch is a pure function of the data, the seed and the position, so a run can resume anywhere.

Samples are counted over all epochs: number n stands in epoch n // len, which goes through the data in an order of its own,
given by the seed and the epoch alone. The position of a run is the number of samples it has seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from pyalpaca.data.indexed import IndexedDataset, idx_path, open_indexed

if TYPE_CHECKING:
    from torch import Tensor

Tokens: TypeAlias = "npt.NDArray[Any]"
IGNORED = -100


class Data(Protocol):
    """Samples by number: `sample(i)` gives (tokens (n,), labels (n,)), not shifted: labels[j] is tokens[j] or -100."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> tuple[Tokens, Tokens]: ...


@dataclass(frozen=True)
class InstructionData:
    """One sample a sequence: the sequences `rows` of prepared instruction data."""

    input_ids: IndexedDataset
    labels: IndexedDataset
    rows: range

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int) -> tuple[Tokens, Tokens]:
        return self.input_ids[self.rows[index]], self.labels[self.rows[index]]

    def silent(self, seq_length: int) -> int:
        """How many samples have no label left once they are cut to `seq_length`: nothing is learnt from them."""
        return sum(bool((self.labels[row][1 : seq_length + 1] == IGNORED).all()) for row in self.rows)


@dataclass(frozen=True)
class TextData:
    """The tokens `start` to `stop` of a text cut to pieces of `seq_length`; a last piece that is not full is left out."""

    text: IndexedDataset
    seq_length: int
    start: int
    stop: int

    def __len__(self) -> int:
        # The last token of a sample is only a label: it is the first token of the next sample.
        return max(0, (self.stop - self.start - 1) // self.seq_length)

    def sample(self, index: int) -> tuple[Tokens, Tokens]:
        first = self.start + index * self.seq_length
        tokens = self.text.tokens[first : first + self.seq_length + 1]
        return tokens, tokens


def open_instruction_data(prefix: str | Path) -> InstructionData:
    """Open what tools/preprocess_data.py made of instructions; PREFIX is its --output-prefix, with or without `_packed`.

    FileNotFoundError if there is no such data; ValueError if the files are damaged or do not belong together.
    """
    full = _first_existing(str(prefix), "input_ids_document")
    ids = open_indexed(f"{full}_input_ids_document")
    labels = open_indexed(f"{full}_labels_document")
    if not np.array_equal(ids.lengths, labels.lengths):
        raise ValueError(
            f"{idx_path(labels.prefix)}: its {len(labels):,} sequences are not as long as the {len(ids):,} of "
            f"{idx_path(ids.prefix).name}; the files are of different data sets, prepare the data again"
        )
    return InstructionData(ids, labels, range(len(ids)))


def open_text_data(prefix: str | Path, seq_length: int, key: str = "text") -> TextData:
    """Open pre-training text made by GeneralPretrainHandler: all documents in a row, cut to pieces of `seq_length`.

    FileNotFoundError if there is no such data; ValueError if it is shorter than one piece.
    """
    text = open_indexed(f"{prefix}_{key}_document")
    data = TextData(text, seq_length, 0, len(text.tokens))
    if not len(data):
        raise ValueError(
            f"{text.prefix}.bin: holds {len(text.tokens):,} tokens, expected more than the sequence length {seq_length:,}; "
            "use more text or shorter sequences"
        )
    return data


def _first_existing(prefix: str, name: str) -> str:
    candidates = [f"{prefix}_packed", prefix]
    for candidate in candidates:
        if idx_path(f"{candidate}_{name}").is_file():
            return candidate
    raise FileNotFoundError(
        f"{candidates[0]}_{name}.idx: no such file, expected prepared instruction data; "
        "make it with tools/preprocess_data.py --handler-name GeneralInstructionHandler and give its --output-prefix here"
    )


def fingerprint(data: InstructionData | TextData) -> str:
    """What tells data sets apart: a sha256 of all lengths and of 64 stretches of the tokens (of all, if they are few)."""
    parts = [data.text] if isinstance(data, TextData) else [data.input_ids, data.labels]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part.lengths).tobytes())
        size = len(part.tokens)
        for i in range(64):
            start = size * i // 64
            digest.update(np.ascontiguousarray(part.tokens[start : min(size * (i + 1) // 64, start + 65536)]).tobytes())
    return digest.hexdigest()


def split_bounds(weights: str, size: int) -> list[int]:
    """Where train, validation and test begin and end in `size` samples, as Megatron counts: "949,50,1" -> 4 bounds."""
    try:
        parts = [float(part) for part in weights.replace("/", ",").split(",")]
    except ValueError as error:
        raise ValueError(f"split {weights!r}: expected up to three numbers such as 949,50,1") from error
    if len(parts) > 3 or min(parts) < 0 or not sum(parts) > 0:
        raise ValueError(f"split {weights!r}: expected up to three numbers, none negative, such as 949,50,1")
    parts += [0.0] * (3 - len(parts))
    bounds = [0]
    for part in parts:
        bounds.append(bounds[-1] + round(part / sum(parts) * size))
    # What rounding gives too much or too little is taken from the training part.
    return [0, *(bound - (bounds[-1] - size) for bound in bounds[1:])]


def split_instruction_data(data: InstructionData, weights: str) -> tuple[InstructionData, InstructionData, InstructionData]:
    """Train, validation and test: consecutive sequences in the proportions of `weights` ("949,50,1")."""
    train, valid, test = (
        InstructionData(data.input_ids, data.labels, data.rows[start:stop]) for start, stop in _pairs(weights, len(data))
    )
    return train, valid, test


def split_text_data(data: TextData, weights: str) -> tuple[TextData, TextData, TextData]:
    """Train, validation and test: consecutive samples in the proportions of `weights` ("949,50,1")."""
    length = data.seq_length
    train, valid, test = (
        TextData(data.text, length, data.start + start * length, data.start + stop * length + 1)
        for start, stop in _pairs(weights, len(data))
    )
    return train, valid, test


def _pairs(weights: str, size: int) -> Iterator[tuple[int, int]]:
    return pairwise(split_bounds(weights, size))


@lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    # RandomState, because numpy promises that its stream never changes: a run resumed after an update sees the same data.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch]))).permutation(size)


def sample_numbers(size: int, position: int, count: int, seed: int) -> list[int]:
    """Which samples of the data are the samples `position` to `position + count` of a run."""
    return [int(_order(size, seed, n // size)[n % size]) for n in range(position, position + count)]


def batch(
    data: Data,
    position: int,
    batch_size: int,
    seed: int,
    seq_length: int,
    pad_to: Literal["length"] | int = "length",
    rows: slice = slice(None),
    pad_id: int = 0,
) -> tuple[Tensor, Tensor]:
    """The batch of a run that has seen `position` samples: (tokens (B, S), labels (B, S)), both int64.

    `batch_size` is that of all data-parallel ranks together; `rows` picks this rank's micro-batch of it, and S is the same
    whatever the rows. labels[b, t] is the token after tokens[b, t], or -100 where it does not count. Samples are cut to
    `seq_length`; S is `seq_length` for pad_to="length", or the longest sample of the batch rounded up to a multiple of
    `pad_to`. Padding is `pad_id` with label -100.
    """
    if not len(data):
        raise ValueError("the data holds no samples; check the split and the data's prefix")
    numbers = sample_numbers(len(data), position, batch_size, seed)
    wanted = numbers[rows]
    return _collate(data, wanted, len(wanted), _width(data, numbers, seq_length, pad_to), pad_id)


def ordered_batch(
    data: Data,
    first: int,
    last: int,
    rows: int,
    seq_length: int,
    pad_to: Literal["length"] | int = "length",
    pad_id: int = 0,
) -> tuple[Tensor, Tensor]:
    """The samples `first` to `last` in the order of the data, as an evaluation takes them; the result is as that of `batch`.

    It has `rows` rows; those past `last`, perhaps all, are padding.
    """
    numbers = range(first, max(first, min(last, len(data))))
    return _collate(data, numbers, rows, _width(data, numbers, seq_length, pad_to), pad_id)


def _width(data: Data, numbers: Sequence[int], seq_length: int, pad_to: Literal["length"] | int) -> int:
    """Tokens in a row of a batch of these samples."""
    if pad_to == "length":
        return seq_length
    longest = max((len(data.sample(n)[0]) - 1 for n in numbers), default=1)
    return min(seq_length, -(-max(1, longest) // pad_to) * pad_to)


def _collate(data: Data, numbers: Sequence[int], rows: int, width: int, pad_id: int) -> tuple[Tensor, Tensor]:
    import torch

    tokens = np.full((rows, width), pad_id, dtype=np.int64)
    labels = np.full((rows, width), IGNORED, dtype=np.int64)
    for row, n in enumerate(numbers):
        ids, targets = data.sample(n)
        count = min(len(ids) - 1, width)
        tokens[row, :count] = ids[:count]
        labels[row, :count] = targets[1 : count + 1]
    return torch.from_numpy(tokens), torch.from_numpy(labels)
