"""What a file of torch.save may lie about, or be instead, is refused in one sentence that names it."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_makers import ORDERED_DICT, SIX, Call, Name, Storage, legacy_of, pickled, put, steps, tensor, zip_of

from pyalpaca.checkpoint.container.torch_file import open_tensors, open_torch


def refused(path: Path, message: str) -> None:
    for reader in (open_torch, open_tensors):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            reader(path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)


class Weights(Tensor):
    """A subclass that a program may have."""


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class Trap:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


W = pickled({"w": tensor()})
BIG_ENDIAN = zip_of(W, byteorder=b"big")
TAR = b"pickle".ljust(257, b"\0") + b"ustar\x0000" + bytes(300)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><p>Not found", "is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"just a text", "begins with b'just a t'"),
        (bytes(100), r"begins with b'\\x00\\x00"),
        (TAR, r"is in the tar format of torch before 0\.1\.10"),
        (zip_of(W, **{"constants.pkl": b"", "code/__torch__.py": b""}), "is a TorchScript program"),
        (zip_of(W, **{"code/x.py": b""}), "is a TorchScript program"),
        (BIG_ENDIAN, "was written on a big-endian machine"),
        (zip_of(W, byteorder=b"middle"), "has the byte order b'middle'"),
        (zip_of(W, byteorder=b"little" * 9), "has a byteorder of 54 bytes"),
        (saved([torch.ones(1)]), "holds a list, expected a dict of tensors"),
        (saved(torch.ones(1)), "holds a Tensor, expected a dict"),
        (saved(argparse.Namespace(a=1)), r"holds a `argparse\.Namespace`, expected a dict"),
        (saved(torch.nn.Linear(1, 1)), r"its pickle asks for `torch\.nn\.modules\.linear\.Linear`.*save the state_dict"),
        (saved({"w": torch.ones(2, 2).to_sparse()}), "a sparse tensor, expected dense ones"),
        (saved({"w": torch.ones(2, 2, device="meta")}), "a tensor without data"),
        (saved({"w": torch.ones(2).as_subclass(Weights)}), r"asks for `test_torch_files_refused\.Weights`, expected tensors"),
        (saved({"w": torch.ones(2, dtype=torch.complex64).conj()}), "yet to be negated or conjugated"),
        (saved({"w": torch.ones(2), "x": [Trap()]}), r"its pickle asks for `posix\.system`.*don't trust this file"),
        (pickle.dumps(Trap()), r"its pickle asks for `posix\.system`"),
        (pickle.dumps(Trap(), 0), r"its pickle asks for `posix\.system`"),
        (pickle.dumps({"w": 1}), "is a pickle, but not of torch.save"),
        (pickle.dumps(torch.ones(1)), r"asks for `torch\.storage\._load_from_bytes`"),
        (legacy_of(W, ["0"], b"").replace(b"\xe9\x03", b"\xea\x03"), "has another version than 1001"),
    ],
)
def test_what_is_no_file_of_tensors_is_named(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(put(tmp_path / "x.pt", content), message)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "x.pt", r"x\.pt: not found, expected a file")


def test_a_quantized_tensor_is_named(tmp_path: Path) -> None:
    call = Call(Name("torch._utils", "_rebuild_qtensor"), (Storage(kind="QInt8Storage"), 0, (2,), (1,), (), False, {}))
    refused(put(tmp_path / "x.pt", zip_of(pickled({"w": call}))), "a quantized tensor, expected plain ones")


def test_a_zip_file_of_something_else_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("weights/pytorch_model.bin", b"x")
    refused(tmp_path / "x.pt", r"is a zip archive without data\.pkl, but with weights/pytorch_model\.bin")


@pytest.mark.parametrize("new", [True, False])
def test_a_file_that_is_cut_off_anywhere_says_how_much_there_is(new: bool, tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({"w": torch.ones(2, 3), "v": torch.zeros(5)}, file, _use_new_zipfile_serialization=new)
    whole = file.getvalue()
    for size in range(1, len(whole)):
        with pytest.raises(ValueError, match=r"is truncated|cut off|damaged|begins with") as error:
            open_torch(put(tmp_path / "x.pt", whole[:size]))
        assert "\n" not in str(error.value)
    if new:
        refused(
            put(tmp_path / "x.pt", whole[:-10]), rf"is truncated \({len(whole) - 10:,} bytes, the end of the archive is missing\)"
        )
    else:
        message = rf"is truncated \({len(whole) - 10:,} bytes found, at least {len(whole):,} expected\)"
        refused(put(tmp_path / "x.pt", whole[:-10]), message)


FAR = 2**61
BAD_TENSORS = {
    "an offset before the storage": (Storage(), -1, (2, 3), (3, 1)),
    "an offset behind the storage": (Storage(), 6, (1,), (1,)),
    "a view that ends behind the storage": (Storage(), 1, (2, 3), (3, 1)),
    "a negative stride": (Storage(), 5, (2,), (-1,)),
    "a stride that leaves the storage": (Storage(), 0, (2, 3), (4, 1)),
    "a negative length": (Storage(), 0, (-1, 3), (3, 1)),
    "lengths whose product overflows": (Storage(), 0, (2**32, 2**32), (0, 0)),
    "a length of 2 to the 61": (Storage(), 0, (FAR,), (0,)),
    "a number shown a billion times": (Storage(), 0, (10**9,), (0,)),
    "strides that overflow to a place inside": (Storage(), 0, (2, 2), (2**63, 2**63)),
    "a length that is no number": (Storage(), 0, (2, "3"), (3, 1)),
    "a length that is true": (Storage(), 0, (2, True), (3, 1)),
    "a length of many digits": (Storage(), 0, (10**5000,), (1,)),
    "too few strides": (Storage(), 0, (2, 3), (3,)),
    "a thousand dimensions": (Storage(), 0, (1,) * 1000, (1,) * 1000),
    "an empty tensor of lengths that can't be counted": (Storage(), 0, (0, FAR, FAR), (1, 1, 1)),
    "an empty tensor of lengths that can hardly be counted": (Storage(), 0, (0, 2**29, 2**29), (1, 1, 1)),
    "an offset that is no number": (Storage(), 0.0, (2, 3), (3, 1)),
    "shapes that are lists": (Storage(), 0, [2, 3], [3, 1]),
    "no storage": ("0", 0, (2, 3), (3, 1)),
    "a storage of more elements than its data": (Storage(count=7), 0, (2, 3), (3, 1)),
    "a storage of fewer elements than its data": (Storage(count=5), 0, (2,), (1,)),
    "a storage of a wider type than its data": (Storage(kind="DoubleStorage"), 0, (2,), (1,)),
    "a storage of 2 to the 61 elements": (Storage(count=FAR), 0, (2, 3), (3, 1)),
    "a storage of a number of elements with many digits": (Storage(count=10**5000), 0, (2, 3), (3, 1)),
    "a storage of a negative number of elements": (Storage(count=-6), 0, (2, 3), (3, 1)),
    "a storage that is not there": (Storage(key="7"), 0, (2, 3), (3, 1)),
    "a storage out of the archive": (Storage(key="../data.pkl"), 0, (2, 3), (3, 1)),
    "a storage without a name": (Storage(key=0), 0, (2, 3), (3, 1)),
    "a storage with a name of a kilobyte": (Storage(key="0" * 1000), 0, (2, 3), (3, 1)),
    "a storage of an unknown type": (Storage(kind="Size"), 0, (2, 3), (3, 1)),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_tensor_that_its_storage_does_not_hold_is_refused(kind: str, tmp_path: Path) -> None:
    content = pickled({"w": tensor(*BAD_TENSORS[kind])})
    for file in (zip_of(content), legacy_of(content, ["0"], struct.pack("<q", 6) + SIX)):
        refused(put(tmp_path / "x.pt", file), "damaged|truncated")


def test_the_same_numbers_are_read_where_they_fit(tmp_path: Path) -> None:
    """What the bad ones above are changed from."""
    content = pickled({"w": tensor()})
    for file in (zip_of(content), legacy_of(content, ["0"], struct.pack("<q", 6) + SIX)):
        assert open_torch(put(tmp_path / "x.pt", file))["w"].shape == (2, 3)


@pytest.mark.parametrize(
    ("keys", "data", "message"),
    [
        (["0"], struct.pack("<q", 5) + SIX, "another number of elements in storage 0"),
        (["0"], struct.pack("<Q", 2**63 + 6) + SIX, "another number of elements in storage 0"),
        (["0"], struct.pack("<q", 6) + SIX[:-1], "is truncated"),
        ([], b"", "has the data of 0 storages, expected 1"),
        ("0", struct.pack("<q", 6) + SIX, "has the data of 0 storages, expected 1"),
        (["0", "0"], (struct.pack("<q", 6) + SIX) * 2, "or one twice"),
        (["0", "1"], (struct.pack("<q", 6) + SIX) * 2, "storages that its pickle does not refer to"),
        ([["0"]], struct.pack("<q", 6) + SIX, "storages that its pickle does not refer to"),
    ],
)
def test_storages_of_the_old_format_that_are_not_as_its_pickle_says_are_refused(
    keys: Any, data: bytes, message: str, tmp_path: Path
) -> None:
    refused(put(tmp_path / "x.pt", legacy_of(W, keys, data)), message)


def patched(content: bytes, signature: bytes, number: int, offset: int, new: bytes) -> bytes:
    """Bytes changed in the `number`-th record that begins with a signature."""
    place = -1
    for _ in range(number + 1):
        place = content.index(signature, place + 1)
    return content[: place + offset] + new + content[place + offset + len(new) :]


LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
TWO = zip_of(pickled({"w": tensor(), "v": tensor(Storage("1"))}), {"0": SIX, "1": SIX})
SECOND = struct.unpack_from("<I", TWO, TWO.index(CENTRAL, TWO.index(CENTRAL) + 1) + 42)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (patched(TWO, CENTRAL, 2, 42, struct.pack("<I", SECOND)), "archive/data/0 at another place than its zip table says"),
        (patched(TWO, CENTRAL, 1, 20, struct.pack("<II", 60, 60)), "archive/data/0 at another place than its zip table says"),
        (patched(TWO, CENTRAL, 2, 20, struct.pack("<II", 200, 200)), "archive/data/1 at another place than its zip table says"),
        (patched(TWO, CENTRAL, 2, 20, struct.pack("<II", 24, 25)), "archive/data/1 compressed or encrypted"),
        (patched(TWO, CENTRAL, 2, 10, b"\x08\x00"), "archive/data/1 compressed or encrypted"),
        (patched(TWO, CENTRAL, 2, 8, b"\x01\x00"), "archive/data/1 compressed or encrypted"),
        (patched(TWO, CENTRAL, 2, 46, b"archive/data/0"), "two members of one name"),
        (patched(TWO, CENTRAL, 2, 46, b"archivf/data/1"), "has no archive/data/1, which it needs"),
        (patched(TWO, CENTRAL, 2, 42, b"\xff\xff\xff\x7f"), "archive/data/1 at another place"),
        (patched(TWO, LOCAL, 2, 0, b"PK\x07\x08"), "archive/data/1 at another place"),
        (patched(TWO, LOCAL, 2, 26, b"\xff\xff"), "archive/data/1 at another place"),
        (patched(TWO, LOCAL, 2, 28, b"\xff\xff"), "archive/data/1 at another place"),
        (patched(TWO, LOCAL, 2, 30, b"archive/data/0"), "archive/data/1 at another place"),
        (patched(TWO, LOCAL, 0, 60, b"\xff"), "does not fit its checksum"),
        (patched(TWO, END, 0, 12, struct.pack("<I", 2**32 - 2)), "has a damaged zip table"),
        (patched(TWO, END, 0, 16, struct.pack("<I", 2**32 - 2)), "archive/data.pkl at another place"),
        (patched(TWO, CENTRAL, 0, 0, b"PK\x07\x08"), "has a damaged zip table"),
        (patched(TWO, CENTRAL, 0, 6, b"\xff\xff"), "has a damaged zip table"),
        (patched(TWO, CENTRAL, 0, 28, b"\xff\xff"), r"without data\.pkl, but with archive/data\.pklPK"),
        (b"PK\x03\x04" + bytes(100) + zip_of(W)[zip_of(W).index(END) :], "damaged|without data.pkl"),
    ],
)
def test_a_zip_archive_that_lies_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    assert content != TWO
    refused(put(tmp_path / "x.pt", content), message)


def test_a_storage_with_a_long_name_is_refused_before_it_is_looked_for(tmp_path: Path) -> None:
    """Every tensor of it would copy the name."""
    refused(put(tmp_path / "x.pt", zip_of(pickled({"w": tensor(Storage("0" * 1000))}))), "something else than a storage")


def test_a_table_too_long_for_any_archive_is_refused_unread(tmp_path: Path) -> None:
    content = LOCAL + bytes(20 << 20) + END + struct.pack("<HHHHIIH", 0, 0, 9, 9, 17 << 20, 1 << 20, 0)
    refused(put(tmp_path / "x.pt", content), "has a damaged zip table .its table has 17,825,792 bytes")


def test_two_pickles_are_refused(tmp_path: Path) -> None:
    """Which of them another reader takes can't be known."""
    with zipfile.ZipFile(put(tmp_path / "x.pt", zip_of(W)), "a") as archive:
        archive.writestr("other/data.pkl", pickled({"w": 1}))
    refused(tmp_path / "x.pt", r"has several data\.pkl, expected one")


def test_a_zip_archive_that_was_packed_again_is_refused_if_compressed_and_read_if_not(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 3)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        with zipfile.ZipFile(tmp_path / "y.pt", "w", kind) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        if kind == zipfile.ZIP_DEFLATED:
            refused(
                tmp_path / "y.pt", "compressed or encrypted, which torch.save never does; unpack it and pack it with `zip -0 -r`"
            )
    assert open_torch(tmp_path / "y.pt")["w"].tolist() == [[1] * 3] * 2


def test_a_pickled_model_of_the_old_format_is_named(tmp_path: Path) -> None:
    """It has a persistent id for the class, with its source."""
    model = ("module", Name("__main__", "Net"), "net.py", "class Net: ...")
    refused(
        put(tmp_path / "x.pt", legacy_of(b"\x80\x02" + steps(model) + b"Q.", [], b"")), r"its pickle asks for `__main__\.Net`"
    )


def test_a_rule_of_the_reader_is_no_tensor(tmp_path: Path) -> None:
    """The name of an allowed function, stored as a value, gives nothing to call."""
    content = pickled({"w": tensor(), "function": ORDERED_DICT})
    assert not isinstance(open_torch(put(tmp_path / "x.pt", zip_of(content)))["function"], (types.FunctionType, type))
