"""Packing: every sample once, rows that are full, boundaries that nothing is learnt across."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyalpaca.data import InstructionData, batch, batch_starts, indexed_writer, open_instruction_data, pack
from pyalpaca.data.packing import fit


@given(st.lists(st.integers(0, 40), max_size=80))
def test_every_item_is_in_one_row_no_row_is_too_full_and_no_two_could_be_one(lengths: list[int]) -> None:
    rows = fit(lengths, 40)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[n] for n in row) for row in rows)
    assert all(size <= 40 for size in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > 40
    assert fit(lengths, 40) == rows


@pytest.fixture
def data(tmp_path: Path) -> InstructionData:
    """Ten samples of 3 to 12 tokens; the first two tokens of each are a prompt."""
    for key in ("input_ids", "labels"):
        with indexed_writer(tmp_path / f"d_{key}_document") as writer:
            for n in range(10):
                tokens = list(range(100 * n, 100 * n + n + 3))
                writer.add(tokens if key == "input_ids" else [-100, -100, *tokens[2:]])
                writer.end_document()
    return open_instruction_data(tmp_path / "d")


def test_a_row_is_its_samples_and_tells_no_first_token(data: InstructionData) -> None:
    packed = pack(data, 11)
    assert len(packed) == 7 and packed.filled() == 75 / 84
    for index, row in enumerate(packed.rows):
        tokens, labels = packed.sample(index)
        assert len(tokens) == len(labels) <= 12
        starts = [*packed.starts(index), len(tokens)]
        for n, start, stop in zip(row, starts[:-1], starts[1:], strict=True):
            ids, targets = data.sample(n)
            assert np.array_equal(tokens[start:stop], ids) and np.array_equal(labels[start + 1 : stop], targets[1:])
            assert labels[start] == -100


def test_what_is_too_long_is_cut_and_has_its_row_alone(data: InstructionData) -> None:
    packed = pack(data, 7)
    assert [len(row) for row in packed.rows[:5]] == [1] * 5
    assert [len(packed.sample(i)[0]) for i in range(5)] == [8] * 5
    assert sorted(n for row in packed.rows for n in row) == list(range(10))


def test_a_batch_and_its_starts_are_of_the_same_rows(data: InstructionData) -> None:
    packed = pack(data, 11)
    rows = slice(2, 5)
    tokens, labels = batch(packed, 4, 6, 3, 11, rows=rows)
    starts = batch_starts(packed, 4, 6, 3, rows)
    assert len(starts) == len(tokens) == 3
    for ids, targets, begins in zip(tokens, labels, starts, strict=True):
        assert [int(ids[at]) % 100 for at in begins] == [0] * len(begins)
        assert sum(int(x) % 100 == 0 for x in ids if x) == sum(int(ids[at]) > 0 for at in begins)
        assert all(targets[at - 1] == -100 for at in begins if at)
