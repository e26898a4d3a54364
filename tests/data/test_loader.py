from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyalpaca.data import (
    InstructionData,
    batch,
    fingerprint,
    indexed_writer,
    open_instruction_data,
    open_text_data,
    ordered_batch,
    split_bounds,
    split_instruction_data,
    split_text_data,
)

LENGTHS = [5, 3, 9, 2, 7, 4, 10, 12, 6, 8]


def instructions(prefix: Path) -> InstructionData:
    """Sequence i holds 100 (i + 1), 100 (i + 1) + 1, ...; its first two tokens are only read."""
    with indexed_writer(f"{prefix}_input_ids_document") as ids, indexed_writer(f"{prefix}_labels_document") as labels:
        for i, length in enumerate(LENGTHS):
            sequence = [100 * (i + 1) + j for j in range(length)]
            ids.add(sequence)
            labels.add([-100 if j < 2 else token for j, token in enumerate(sequence)])
            ids.end_document()
            labels.end_document()
    return open_instruction_data(prefix)


@pytest.fixture
def data(tmp_path: Path) -> InstructionData:
    return instructions(tmp_path / "d")


def test_a_label_is_the_next_token_or_does_not_count(data: InstructionData) -> None:
    tokens, labels = batch(data, 0, len(LENGTHS), seed=1, seq_length=8)
    assert tokens.shape == labels.shape == (10, 8)
    assert tokens.dtype == labels.dtype == torch.int64
    seen = set()
    for row, row_labels in zip(tokens.tolist(), labels.tolist(), strict=True):
        first = row[0]
        length = min(LENGTHS[first // 100 - 1] - 1, 8)
        seen.add(first)
        assert row == [first + j for j in range(length)] + [0] * (8 - length)
        assert row_labels == [first + j + 1 if j >= 1 else -100 for j in range(length)] + [-100] * (8 - length)
    assert len(seen) == 10


def test_every_epoch_sees_every_sample_once_in_an_order_of_its_own(data: InstructionData) -> None:
    epochs = []
    for epoch in range(3):
        rows = [batch(data, 10 * epoch + n, 1, seed=7, seq_length=12)[0][0].tolist() for n in range(10)]
        assert len({tuple(row) for row in rows}) == 10
        epochs.append(rows)
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_is_a_function_of_position_and_seed(data: InstructionData) -> None:
    whole = batch(data, 6, 8, seed=3, seq_length=12)
    torch.testing.assert_close(batch(data, 6, 8, seed=3, seq_length=12), whole)
    # A batch that crosses the epoch equals the two halves, whatever ran before.
    halves = [batch(data, 6 + start, 4, seed=3, seq_length=12) for start in (0, 4)]
    torch.testing.assert_close(torch.cat([tokens for tokens, _ in halves]), whole[0])
    assert not torch.equal(batch(data, 6, 8, seed=4, seq_length=12)[0], whole[0])


def test_the_order_never_changes_between_versions(data: InstructionData) -> None:
    """A run that is resumed later must see the data that it would have seen."""
    order = [int(batch(data, n, 1, seed=1234, seq_length=12)[0][0, 0]) // 100 - 1 for n in range(10)]
    assert order == [2, 9, 8, 1, 7, 0, 4, 3, 5, 6]


def test_a_sequence_without_a_next_token_is_only_padding(tmp_path: Path) -> None:
    with indexed_writer(tmp_path / "d_input_ids_document") as ids, indexed_writer(tmp_path / "d_labels_document") as labels:
        ids.add([5])
        labels.add([5])
    tokens, targets = batch(open_instruction_data(tmp_path / "d"), 0, 1, seed=0, seq_length=8, pad_to=2)
    assert (tokens.tolist(), targets.tolist()) == ([[0, 0]], [[-100, -100]])


@pytest.mark.parametrize("pad_to", ["length", 4, 1, 64])
def test_all_ranks_have_the_same_width(data: InstructionData, pad_to: object) -> None:
    whole = batch(data, 0, 8, seed=5, seq_length=10, pad_to=pad_to)  # type: ignore[arg-type]
    parts = [batch(data, 0, 8, seed=5, seq_length=10, pad_to=pad_to, rows=slice(i, i + 2)) for i in range(0, 8, 2)]  # type: ignore[arg-type]
    torch.testing.assert_close(torch.cat([tokens for tokens, _ in parts]), whole[0])
    torch.testing.assert_close(torch.cat([labels for _, labels in parts]), whole[1])


def test_padding_goes_to_the_length_or_to_a_multiple(data: InstructionData) -> None:
    def width(pad_to: object) -> int:
        return batch(data, 0, 10, seed=5, seq_length=16, pad_to=pad_to)[0].shape[1]  # type: ignore[arg-type]

    assert [width("length"), width(4), width(8), width(1)] == [16, 12, 16, 11]
    assert batch(data, 0, 10, seed=5, seq_length=6, pad_to=4)[0].shape == (10, 6)
    assert batch(data, 0, 10, seed=5, seq_length=16, pad_id=9)[0].min() >= 0


def test_the_known_split_of_alpaca() -> None:
    assert split_bounds("949,50,1", 52_002) == [0, 49_350, 51_950, 52_002]
    assert split_bounds("969, 30, 1", 1000) == [0, 969, 999, 1000]
    assert split_bounds("100,0,0", 7) == [0, 7, 7, 7]
    assert split_bounds("1", 5) == [0, 5, 5, 5]
    for wrong in ("a,b", "", "1,2,3,4", "0,0,0", "-1,2,0"):
        with pytest.raises(ValueError, match="expected up to three numbers"):
            split_bounds(wrong, 10)


def test_the_parts_of_a_split_are_consecutive(data: InstructionData) -> None:
    parts = split_instruction_data(data, "6,3,1")
    assert [list(part.rows) for part in parts] == [[0, 1, 2, 3, 4, 5], [6, 7, 8], [9]]
    assert parts[1].sample(1)[0][0] == 800
    with pytest.raises(ValueError, match="holds no samples"):
        batch(split_instruction_data(data, "1,0,0")[2], 0, 1, seed=0, seq_length=4)


def test_a_prefix_is_found_with_and_without_packed(tmp_path: Path) -> None:
    instructions(tmp_path / "d_packed")
    assert len(open_instruction_data(tmp_path / "d")) == len(open_instruction_data(tmp_path / "d_packed")) == 10
    with pytest.raises(FileNotFoundError, match=r"e_packed_input_ids_document\.idx: no such file.*--output-prefix"):
        open_instruction_data(tmp_path / "e")


def test_labels_of_other_data_are_refused(tmp_path: Path) -> None:
    instructions(tmp_path / "d")
    with indexed_writer(tmp_path / "d_labels_document") as labels:
        labels.add([1, 2])
    with pytest.raises(ValueError, match=r"not as long as the 10 of d_input_ids_document\.idx"):
        open_instruction_data(tmp_path / "d")


def test_text_is_cut_to_pieces_that_share_their_borders(tmp_path: Path) -> None:
    with indexed_writer(tmp_path / "t_text_document") as writer:
        for start in range(0, 30, 5):
            writer.add(list(range(start, start + 5)))
            writer.end_document()
    data = open_text_data(tmp_path / "t", seq_length=4)
    assert len(data) == 7
    rows = sorted(zip(*(t.tolist() for t in batch(data, 0, 7, seed=0, seq_length=4)), strict=True))
    assert rows == [([i, i + 1, i + 2, i + 3], [i + 1, i + 2, i + 3, i + 4]) for i in range(0, 28, 4)]
    train, valid, test = split_text_data(data, "5,2,0")
    assert [len(part) for part in (train, valid, test)] == [5, 2, 0]
    assert valid.sample(0)[0].tolist() == [20, 21, 22, 23, 24]
    with pytest.raises(ValueError, match="holds 30 tokens, expected more than the sequence length 30"):
        open_text_data(tmp_path / "t", seq_length=30)


def test_an_evaluation_takes_samples_in_their_own_order_and_fills_up_with_padding(data: InstructionData) -> None:
    tokens, labels = ordered_batch(data, 8, 10, 4, seq_length=8, pad_to=4)
    assert tokens[:, 0].tolist() == [900, 1000, 0, 0]
    assert tokens.shape == labels.shape == (4, 8)
    assert (labels[2:] == -100).all()
    nothing = ordered_batch(data, 12, 10, 2, seq_length=8, pad_to=4)
    assert nothing[0].tolist() == [[0] * 4] * 2 and (nothing[1] == -100).all()
    assert ordered_batch(data, 0, 1, 1, seq_length=8)[0].tolist() == [[100, 101, 102, 103, 0, 0, 0, 0]]


def test_a_fingerprint_tells_data_sets_apart_wherever_they_lie(tmp_path: Path, data: InstructionData) -> None:
    assert fingerprint(instructions(tmp_path / "copy")) == fingerprint(data)
    assert fingerprint(split_instruction_data(data, "6,3,1")[1]) == fingerprint(data)

    def text(name: str, *documents: list[int]) -> str:
        with indexed_writer(tmp_path / f"{name}_text_document") as writer:
            for document in documents:
                writer.add(document)
                writer.end_document()
        return fingerprint(open_text_data(tmp_path / name, seq_length=4))

    found = [text("a", [1, 2, 3, 4, 5, 6]), text("b", [1, 2, 3, 4, 5, 7]), text("c", [1, 2, 3], [4, 5, 6])]
    assert len({*found, fingerprint(data)}) == 4
