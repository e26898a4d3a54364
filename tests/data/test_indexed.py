from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyalpaca.data import indexed_writer, open_indexed
from pyalpaca.data.indexed import DTYPES

DOCUMENTS = st.lists(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6), max_size=3), max_size=6)


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "int32") -> None:
    with indexed_writer(prefix, dtype) as writer:
        for document in documents:
            for sequence in document:
                writer.add(sequence)
            writer.end_document()


@given(documents=DOCUMENTS)
@settings(deadline=None, max_examples=60)
def test_what_is_written_is_read(documents: list[list[list[int]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "x"
        write(prefix, documents)
        data = open_indexed(prefix)
        assert [data[i].tolist() for i in range(len(data))] == [s for document in documents for s in document]
        assert data.documents.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
        assert data.dtype == np.int32


def test_the_files_are_laid_out_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "x", [[[7, -100]], [[1], [2, 3, 4]]])
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<6i", 7, -100, 1, 2, 3, 4)
    assert (tmp_path / "x.idx").read_bytes() == (
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3) + struct.pack("<3i3q3q", 2, 1, 3, 0, 8, 12, 0, 1, 3)
    )


def test_alpaca_s_52002_documents_have_the_known_index_size(tmp_path: Path) -> None:
    with indexed_writer(tmp_path / "x") as writer:
        for i in range(52_002):
            writer.add([i])
            writer.end_document()
    assert (tmp_path / "x.idx").stat().st_size == 1_040_082
    assert open_indexed(tmp_path / "x")[52_001].tolist() == [52_001]


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_code_works_both_ways(code: int, tmp_path: Path) -> None:
    write(tmp_path / "x", [[[1, 2, 3]], [[4]]], DTYPES[code].str)
    assert (tmp_path / "x.idx").read_bytes()[17] == code
    data = open_indexed(tmp_path / "x")
    assert data.dtype == DTYPES[code]
    assert data[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("code", [6, 7])
def test_the_floating_codes_of_newer_writers_are_understood(code: int, tmp_path: Path) -> None:
    write(tmp_path / "x", [[[0.5, 2.0]]], DTYPES[code].str)
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    raw[17] = 13 - code
    (tmp_path / "x.idx").write_bytes(raw)
    assert open_indexed(tmp_path / "x").dtype == DTYPES[code]
    assert open_indexed(tmp_path / "x")[0].tolist() == [0.5, 2.0]


def test_a_value_that_does_not_fit_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="values from -100 to 5, which uint16 cannot hold"):
        write(tmp_path / "x", [[[1]], [[5, -100]]], "uint16")
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_without_a_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no code"), indexed_writer(tmp_path / "x", "complex64"):
        pass


def damage(raw: bytes, how: str) -> bytes:
    return {
        "magic": b"TNTIDX\x00\x00\x00" + raw[9:],
        "version": raw[:9] + struct.pack("<Q", 2) + raw[17:],
        "dtype": raw[:17] + b"\x0b" + raw[18:],
        "header": raw[:20],
        "index": raw[:-3],
        "offsets": raw[:42] + struct.pack("<2q", 0, 4000) + raw[58:],
        "overflow": raw[:42] + struct.pack("<2q", 2**63 - 4, 8) + raw[58:],
        "document": raw[:58] + struct.pack("<3q", 0, 1, 3),
        "order": raw[:58] + struct.pack("<3q", 0, 2, 1),
    }[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("magic", r"begins with b'TNTIDX.*expected b'MMIDIDX"),
        ("version", "has version 2, expected 1"),
        ("dtype", "has dtype code 11, expected 1 to 8"),
        ("header", "has 20 bytes, expected at least 34"),
        ("index", "has 79 bytes, expected 82 for 2 sequences and 3 document starts"),
        ("offsets", "sequences that lie outside x.bin"),
        ("overflow", "sequences that lie outside x.bin"),
        ("document", "documents that begin at no sequence from 0 to 2"),
        ("order", "documents that begin at no sequence from 0 to 2, or not in order"),
    ],
)
def test_a_damaged_index_says_what_is_wrong(how: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "x", [[[1, 2]], [[3]]])
    (tmp_path / "x.idx").write_bytes(damage((tmp_path / "x.idx").read_bytes(), how))
    with pytest.raises(ValueError, match=message):
        open_indexed(tmp_path / "x")


def test_a_truncated_bin_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", [[[1, 2]], [[3]]])
    (tmp_path / "x.bin").write_bytes(b"\0" * 11)
    with pytest.raises(ValueError, match=r"x\.bin: has 11 bytes, expected 12.*cut off"):
        open_indexed(tmp_path / "x")
    (tmp_path / "x.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.bin: no such file"):
        open_indexed(tmp_path / "x")
