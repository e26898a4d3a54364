"""Short samples packed into rows of one length; their lengths alone say which lie together, so all epochs have the same rows.

Best fit, the longest first: no two rows could be one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from pyalpaca.data.loader import IGNORED, InstructionData, Tokens, sample_numbers


@dataclass(frozen=True)
class PackedData:
    """Rows of several samples each, as the samples of a run; rows[i]: the numbers of the samples in row i.

    A sample is cut to `seq_length` + 1 tokens, of which the last in a row is only a label.
    """

    data: InstructionData
    seq_length: int
    rows: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int) -> tuple[Tokens, Tokens]:
        """The samples of a row one after the other; none has to tell the first token of the next one."""
        parts = [self.data.sample(n) for n in self.rows[index]]
        tokens = np.concatenate([ids[: self.seq_length + 1] for ids, _ in parts])
        labels = np.concatenate([targets[: self.seq_length + 1] for _, targets in parts])
        labels[[start for start in self.starts(index) if start < len(labels)]] = IGNORED
        return tokens, labels

    def starts(self, index: int) -> list[int]:
        """Where in a row its samples begin; the first is 0."""
        lengths = self._lengths(self.rows[index])
        return [0, *accumulate(lengths[:-1])]

    def filled(self) -> float:
        """Which share of all positions has a token."""
        tokens = sum(sum(self._lengths(row)) for row in self.rows)
        return tokens / max(1, len(self.rows) * (self.seq_length + 1))

    def _lengths(self, row: Sequence[int]) -> list[int]:
        return [min(int(self.data.input_ids.lengths[self.data.rows[n]]), self.seq_length + 1) for n in row]


def pack(data: InstructionData, seq_length: int) -> PackedData:
    """The data packed into rows of `seq_length` tokens and a last label."""
    lengths = np.minimum(data.input_ids.lengths[data.rows.start : data.rows.stop], seq_length + 1)
    return PackedData(data, seq_length, tuple(map(tuple, fit(lengths.tolist(), seq_length + 1))))


def fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which items, none longer than `capacity`, share a row: the longest item first, each to the fullest row that it fits in."""
    rows: list[list[int]] = []
    having: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room that is left in them
    some = 0  # bit r: there is a row with room r
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        fitting = some >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = having[room].pop()
            if not having[room]:
                some ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        having[room - length].append(row)
        some |= 1 << (room - length)
    return rows


def batch_starts(data: PackedData, position: int, batch_size: int, seed: int, rows: slice = slice(None)) -> list[list[int]]:
    """Where the samples begin in each row of the `batch` of the same arguments."""
    return [data.starts(n) for n in sample_numbers(len(data), position, batch_size, seed)[rows]]
