"""GGUF files are what the official package reads and writes; a header that lies is told so in a sentence."""

from __future__ import annotations

import dataclasses
import struct

import gguf
import numpy as np
import pytest
import torch
from checkpoint_makers import CONFIG, model
from gguf_makers import blocks, official
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyalpaca.checkpoint.container import gguf_types
from pyalpaca.checkpoint.container.gguf_file import gguf_layout, open_gguf_file, open_gguf_files
from pyalpaca.checkpoint.container.gguf_types import decode, encode
from pyalpaca.checkpoint.gguf_model import open_gguf, write_gguf
from pyalpaca.checkpoint.plan import write_file

QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
VALUES = {
    "general.architecture": "llama",
    "a.name": "羊驼 \n",
    "a.true": True,
    "a.false": False,
    **{f"a.{kind}": np.dtype(kind).type(7) for kind in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")},
    "a.texts": ["", "é", "x" * 300],
    "a.bools": np.array([True, False, True]),
    **{f"a.{kind}s": np.arange(5).astype(kind) for kind in ("u1", "i2", "u4", "i8", "f4", "f8")},
}


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


KINDS = {"first": "F16", "second": "Q8_0", "norm": "F32", "third": "BF16"}


def made():
    rows = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    kinds = {name: gguf.GGMLQuantizationType[kind] for name, kind in KINDS.items()}
    return {name: gguf.quants.quantize(rows[0] if name == "norm" else rows, kind) for name, kind in kinds.items()}, rows


def test_a_file_is_byte_for_byte_what_the_official_writer_writes(tmp_path):
    arrays, rows = made()
    theirs = official(tmp_path / "theirs.gguf", VALUES, arrays, KINDS)
    table = {name: ((64,) if name == "norm" else (3, 64), kind) for name, kind in KINDS.items()}
    layout = gguf_layout("ours.gguf", VALUES, table)
    values = {name: torch.from_numpy(rows[0] if name == "norm" else rows) for name in KINDS}
    write_file(layout, tmp_path / "ours.gguf", {name: encode(values[name], kind) for name, kind in KINDS.items()})
    assert (tmp_path / "ours.gguf").read_bytes() == theirs.read_bytes()


def test_a_file_of_the_official_writer_is_read_with_types_and_values(tmp_path):
    arrays, rows = made()
    file = open_gguf_file(official(tmp_path / "a.gguf", VALUES, arrays, KINDS))
    assert list(file.metadata) == list(VALUES)
    assert [key for key in VALUES if not same(file.metadata[key], VALUES[key])] == []
    assert file.types == KINDS
    assert file.tensors.dtypes == {
        "first": torch.float16,
        "second": torch.float32,
        "norm": torch.float32,
        "third": torch.bfloat16,
    }
    assert torch.equal(file.tensors.read("first", None), torch.from_numpy(rows).half())
    assert torch.equal(file.tensors.read("norm", None), torch.from_numpy(rows[0]))
    assert torch.equal(file.tensors.read("third", None), torch.from_numpy(rows).bfloat16())
    assert torch.equal(
        file.tensors.read("second", None),
        torch.from_numpy(gguf.quants.dequantize(arrays["second"], gguf.GGMLQuantizationType.Q8_0)),
    )


def test_a_file_may_have_another_alignment_and_version_2(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("a", np.arange(3, dtype=np.float32))
    writer.add_tensor("b", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    raw = bytearray((tmp_path / "a.gguf").read_bytes())
    raw[4] = 2
    (tmp_path / "a.gguf").write_bytes(raw)
    file = open_gguf_file(tmp_path / "a.gguf")
    assert file.tensors.read("b", None).tolist() == [0, 1, 2, 3, 4]
    assert file.tensors.read("a", (0, 1, 3)).tolist() == [1, 2]


def test_a_file_is_read_in_parts_from_any_of_them(tmp_path):
    arrays = {f"t{i}": np.full((2, 4), i, np.float32) for i in range(5)}
    official(tmp_path / "m.gguf", {"a.name": "x"}, arrays, split_max_tensors=2)
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for name in names:
        file = open_gguf_files(tmp_path / name)
        assert {key: file.tensors.read(key, None).tolist() for key in file.types} == {k: v.tolist() for k, v in arrays.items()}
        assert file.metadata["a.name"] == "x"
    (tmp_path / names[1]).rename(tmp_path / "other.gguf")
    with pytest.raises(FileNotFoundError, match=r"m-00002-of-00003\.gguf: not found"):
        open_gguf_files(tmp_path / names[0])
    with pytest.raises(ValueError, match=r"other\.gguf: is one of 3 parts, expected a name such as model-00001-of-00003"):
        open_gguf_files(tmp_path / "other.gguf")
    (tmp_path / names[1]).write_bytes((tmp_path / names[0]).read_bytes())
    with pytest.raises(ValueError, match=r"00002-of-00003\.gguf: holds t0, as another part does"):
        open_gguf_files(tmp_path / names[0])


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_types_are_read_whole_and_in_pieces_as_the_official_package_reads_them(kind, tmp_path):
    stored = blocks(kind, (7, 512))
    path = official(tmp_path / "a.gguf", {}, {"w": stored}, {"w": kind})
    whole = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
    file = open_gguf_file(path)
    assert np.isfinite(whole).all()
    assert file.tensors.shapes == {"w": (7, 512)}
    assert np.array_equal(file.tensors.read("w", None).numpy(), whole)
    for piece in ((0, 2, 5), (0, 0, 7), (0, 3, 3), (1, 0, 512), (1, 256, 512), (1, 5, 6), (1, 31, 290), (1, 9, 9)):
        expected = np.take(whole, range(piece[1], piece[2]), piece[0])
        assert np.array_equal(file.tensors.read("w", piece).numpy(), expected), piece


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_are_quantized_to_the_bytes_of_the_official_package(kind, dtype, monkeypatch):
    values = torch.randn(37, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[3], values[4, :32] = 0, 1e-7
    expected = gguf.quants.quantize(values.float().numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(encode(values, kind).numpy(), expected)
    monkeypatch.setattr(gguf_types, "_CHUNK", 500)
    assert np.array_equal(encode(values, kind).numpy(), expected)
    error = (decode(encode(values, kind), kind) - values.float()).abs().reshape(37, 3, 32).amax(-1)
    # Half a step of 255, or a whole one of 16 at the end of the range that has a step less; the scale is a float16.
    steps, most = {"Q8_0": (127, 0.5), "Q4_0": (8, 1.0)}[kind]
    bound = (most / steps + 2**-11) * values.float().abs().reshape(37, 3, 32).amax(-1)
    assert (error <= bound + 127 * 2**-25).all()
    assert error.max() > 0


def test_bfloat16_rounds_as_the_official_package_does():
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    expected = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.BF16)
    assert np.array_equal(encode(values, "BF16").view(torch.uint8).numpy(), expected)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*, version=3, tensors=0, values=0, body=b"", magic=b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, values) + body


def info(name="w", dims=(4,), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HUGE = 1 << 62
HOSTILE = {
    "another file": (b"PK\x03\x04" + bytes(60), r"begins with b'PK"),
    "old": (header(magic=b"tjgg"), "is a GGML file from before GGUF"),
    "version 1": (header(version=1), "is of GGUF version 1, expected little-endian, version 2 or 3"),
    "version 4": (header(version=4), "is of GGUF version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian, expected little-endian"),
    "only a magic": (b"GGUF", "asks for 4 bytes, the file has 4"),
    "many tensors": (header(tensors=HUGE, body=info() * 3 + bytes(64)), "twice"),
    "many values": (header(values=HUGE), "asks for 8 bytes"),
    "long key": (header(values=1, body=struct.pack("<Q", HUGE) + bytes(99)), "asks for 4,611,686,018,427,387,904 bytes"),
    "long string": (header(values=1, body=text("a") + struct.pack("<IQ", 8, 1 << 40) + bytes(9)), "asks for 1,099,511,627,776"),
    "long array": (header(values=1, body=text("a") + struct.pack("<IIQ", 9, 10, HUGE) + bytes(9)), "asks for"),
    "long array of texts": (header(values=1, body=text("a") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(9)), "asks for"),
    "array of arrays": (header(values=1, body=text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)), "no array of arrays"),
    "unknown type": (header(values=1, body=text("a") + struct.pack("<I", 13) + bytes(64)), "names 13 as the type of a value"),
    "key twice": (header(values=2, body=(text("a") + struct.pack("<IB", 0, 1)) * 2), "the key 'a' twice"),
    "tensor twice": (header(tensors=2, body=info() * 2 + bytes(64)), "the tensor 'w' twice"),
    "no dimension": (header(tensors=1, body=info(dims=()) + bytes(64)), "'w' has 0 dimensions"),
    "many dimensions": (header(tensors=1, body=text("w") + struct.pack("<I", 1 << 31) + bytes(64)), "2147483648 dimensions"),
    "empty dimension": (header(tensors=1, body=info(dims=(4, 0)) + bytes(64)), r"has the shape \(0, 4\)"),
    "large dimensions": (header(tensors=1, body=info(dims=(HUGE, HUGE, 4)) + bytes(64)), "expected positive dimensions"),
    "outside": (header(tensors=1, body=info(offset=96) + bytes(64)), "w takes the bytes 160 to 176, but"),
    "far outside": (header(tensors=1, body=info(offset=1 << 63) + bytes(64)), "w takes the bytes"),
    "cut off": (header(tensors=1, body=info(dims=(64, 64)) + bytes(64)), "w takes the bytes 96 to 16,480"),
    "misaligned": (header(tensors=1, body=info(offset=4) + bytes(128)), "a tensor begins at a multiple of 32"),
    "unknown tensor type": (header(tensors=1, body=info(kind=999) + bytes(64)), "w is of type 999, which the gguf package can't"),
    "no decoder": (header(tensors=1, body=info(dims=(256,), kind=15) + bytes(999)), "w is of type 15"),
    "half a block": (header(tensors=1, body=info(dims=(33,), kind=8) + bytes(999)), "rows of 33, expected a multiple of 32"),
    "alignment 0": (header(values=1, body=text("general.alignment") + struct.pack("<II", 4, 0)), r"general\.alignment is"),
    "alignment 48": (header(values=1, body=text("general.alignment") + struct.pack("<II", 4, 48)), r"general\.alignment is"),
    "alignment x": (
        header(values=1, body=text("general.alignment") + struct.pack("<I", 8) + text("x")),
        r"general\.alignment is",
    ),
    "HTML": (b"<!DOCTYPE html><html></html>", "is an HTML page"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "empty": (b"", "is empty, expected a GGUF file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_a_sentence(name, tmp_path):
    content, message = HOSTILE[name]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_gguf_file(tmp_path / "a.gguf")
    assert str(error.value).startswith(f"{tmp_path / 'a.gguf'}: ")


def test_a_hostile_file_can_not_hold_strings_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("pyalpaca.checkpoint.container.gguf_file._MOST_STRINGS", 1000)
    (tmp_path / "a.gguf").write_bytes(header(values=1, body=text("a") + struct.pack("<IIQ", 9, 8, 5000) + bytes(40000)))
    with pytest.raises(ValueError, match="its header holds more than 1,000 strings"):
        open_gguf_file(tmp_path / "a.gguf")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_hostile_file_gives_what_is_there_or_a_sentence_whatever_its_header_says(tmp_path, data):
    path = tmp_path / "fuzz.gguf"
    if not (tmp_path / "good.gguf").exists():
        write_gguf(model(dataclasses.replace(CONFIG, num_layers=1)), tmp_path / "good.gguf")
    raw = bytearray((tmp_path / "good.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 1700))
        value = data.draw(
            st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, bytes(8), b"\0" * 7 + b"\x7f"]))
        )
        raw[at : at + len(value)] = value
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), 1000, 40]))])
    try:
        file = open_gguf_file(path)
        for name in file.types:
            assert tuple(file.tensors.read(name, None).shape) == file.tensors.shapes[name]
        open_gguf(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")
