"""Files of torch.save, in every form it has had, are opened as torch opens them, without copying or running anything."""

from __future__ import annotations

import argparse
import collections
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch_makers import SIX, Call, Name, Storage, legacy_of, pickled, put, tensor, zip_of

from pyalpaca.checkpoint.container.pickle_machine import Inert
from pyalpaca.checkpoint.container.torch_file import open_tensors, open_torch, open_torch_tensors
from pyalpaca.checkpoint.container.torch_layout import CONTAINERS, torch_layout

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
NEW_DTYPES = [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]
FORMS = [
    pytest.param(
        {"pickle_protocol": protocol, "_use_new_zipfile_serialization": new}, id=f"{'zip' if new else 'legacy'}{protocol}"
    )
    for protocol in range(1, 6)
    for new in (True, False)
]


def values(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randn(shape, generator=generator) * 20).to(dtype)


def equal(found: Tensor, wanted: Tensor) -> bool:
    """The same type, shape, strides and bytes."""
    same_kind = (found.dtype, found.shape, found.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
    found_bytes, wanted_bytes = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, wanted))
    return same_kind and found_bytes.equal(wanted_bytes)


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: leaf for key, value in items for name, leaf in leaves(value, f"{prefix}/{key}").items()}
    return {prefix: tree}


def assert_as_torch(path: Path) -> dict[Any, Any]:
    """What we read is what torch.load reads."""
    found, wanted = leaves(open_torch(path)), leaves(torch.load(path, weights_only=True))
    assert list(found) == list(wanted)
    for name, leaf in wanted.items():
        assert equal(found[name].reshape(leaf.shape), leaf) if isinstance(leaf, Tensor) else found[name] == leaf, name
        assert not isinstance(leaf, Tensor) or found[name].stride() == leaf.stride(), name
    return open_torch(path)


# What torch writes.


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_every_type_are_read(form: dict[str, Any], tmp_path: Path) -> None:
    tree = {str(dtype): values(dtype, 3, 5) for dtype in DTYPES}
    torch.save(tree, tmp_path / "x.pt", **form)
    found = open_torch(tmp_path / "x.pt")
    assert list(found) == list(tree)
    assert all(equal(found[name], tree[name]) for name in tree)


@pytest.mark.parametrize("new", [True, False])
def test_tensors_of_new_types_are_read(new: bool, tmp_path: Path) -> None:
    """They lie in storages without a type; torch itself does not read them in the old format."""
    tree = {str(dtype): values(torch.float32, 3, 4).abs().to(dtype)[1:] for dtype in NEW_DTYPES}
    torch.save(tree, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    found = open_torch(tmp_path / "x.pt")
    assert all(equal(found[name], tree[name]) for name in tree)


@pytest.mark.parametrize("form", FORMS)
def test_views_of_every_kind_are_read(form: dict[str, Any], tmp_path: Path) -> None:
    base = values(torch.float32, 6, 8)
    tree = {
        "whole": base,
        "transposed": base.T,
        "rows": base[2:4],
        "part": base[1::2, 3:7:2],
        "expanded": base[:, :1].expand(6, 8),
        "scalar": base[3, 3],
        "one number": torch.tensor(2.5),
        "empty": torch.empty(0),
        "empty of a shape": torch.empty(4, 0, 3),
        "no rows": base[6:],
        "windows": base.unfold(1, 4, 2),
        "other": values(torch.float16, 3),
    }
    torch.save(tree, tmp_path / "x.pt", **form)
    found = open_torch(tmp_path / "x.pt")
    assert {name: equal(found[name], tree[name]) for name in tree} == dict.fromkeys(tree, True)
    places = {
        found[name].untyped_storage().data_ptr() for name in tree if tree[name].numel() and name not in ("one number", "other")
    }
    assert len(places) == 1, "views of one storage share it"


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_is_read_with_its_ties_and_without_its_metadata(form: dict[str, Any], tmp_path: Path) -> None:
    model = torch.nn.Sequential(
        collections.OrderedDict(a=torch.nn.Linear(4, 4), b=torch.nn.BatchNorm1d(4), c=torch.nn.Linear(4, 4))
    )
    model.c.weight = model.a.weight
    state = model.state_dict()
    assert state._metadata  # torch keeps it as an attribute of the dict
    torch.save(state, tmp_path / "x.pt", **form)
    found = open_torch(tmp_path / "x.pt")
    assert list(found) == list(state)
    assert all(equal(found[name], state[name]) for name in state)
    assert found["a.weight"].data_ptr() == found["c.weight"].data_ptr() != found["a.bias"].data_ptr()


def test_parameters_are_plain_tensors(tmp_path: Path) -> None:
    """With attributes, as Megatron sets them, or without."""
    plain, marked = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    marked.tensor_model_parallel = True  # type: ignore[attr-defined]
    tagged = torch.full((2,), 7.0)
    tagged.shared = "x"  # type: ignore[attr-defined]
    torch.save({"plain": plain, "marked": marked, "tagged": tagged}, tmp_path / "x.pt")
    found = open_torch(tmp_path / "x.pt")
    assert {name: (type(t), t.requires_grad) for name, t in found.items()} == dict.fromkeys(found, (Tensor, False))
    assert [t.tolist() for t in found.values()] == [[1, 1], [0, 0, 0], [7, 7]]


@pytest.mark.parametrize("form", FORMS)
def test_nested_trees_are_read_as_torch_reads_them(form: dict[str, Any], tmp_path: Path) -> None:
    tree = {
        "model": collections.OrderedDict(
            w=values(torch.float32, 2, 3), layers=[values(torch.int64, 2), (values(torch.bool, 2), "é")]
        ),
        "optimizer": {
            "state": {0: {"step": torch.tensor(3), "exp_avg": torch.ones(2)}},
            "param_groups": [{"lr": 1e-4, "params": [0]}],
        },
        "iteration": 2**40,
        "shapes": [torch.Size([2, 3])],
        "names": {"a", "b"},
        "nothing": None,
        "done": True,
    }
    torch.save(tree, tmp_path / "x.pt", **form)
    found = assert_as_torch(tmp_path / "x.pt") if form["pickle_protocol"] == 2 else open_torch(tmp_path / "x.pt")
    assert found["iteration"] == 2**40
    assert found["names"] == {"a", "b"}
    assert found["optimizer"]["param_groups"] == [{"lr": 1e-4, "params": [0]}]
    assert equal(found["model"]["layers"][1][0], values(torch.bool, 2))


def test_a_training_checkpoint_is_read_around_what_is_no_tensor(tmp_path: Path) -> None:
    args = argparse.Namespace(num_layers=2, padded_vocab_size=128, params_dtype=torch.float16)
    tree = {
        "args": args,
        "checkpoint_version": 3.0,
        "model": {"w": values(torch.float16, 4)},
        "rng_state": [{"cuda": torch.ones(3)}],
    }
    torch.save(tree, tmp_path / "model_optim_rng.pt")
    found = open_torch(tmp_path / "model_optim_rng.pt")
    assert isinstance(found["args"], Inert)
    assert found["args"].state == vars(args)
    assert equal(found["model"]["w"], values(torch.float16, 4))


def test_tensors_saved_on_an_ascend_npu_are_read(tmp_path: Path) -> None:
    """torch_npu has its own function for them; the storage is an ordinary one, brought to the CPU before."""
    content = pickled(
        {
            f"format {i}": Call(Name("torch_npu.utils.storage", "_rebuild_npu_tensor"), (*tensor().args, form))
            for i, form in enumerate((2, True, Call(Name("torch_npu.npu._format", "Format"), (2,))))
        }
    )
    found = open_torch(put(tmp_path / "x.pt", zip_of(content)))
    assert [t.shape for t in found.values()] == [(2, 3)] * 3
    assert all(t.contiguous().view(torch.uint8).flatten().tolist() == list(SIX) for t in found.values())


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_files_of_older_torches_are_read(container: str, tmp_path: Path) -> None:
    layout = torch_layout("x.pth", {"w": ((2, 3), torch.float32)}, container)
    write_sparse(tmp_path / "x.pth", layout)
    assert open_torch(tmp_path / "x.pth")["w"].tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("root", ["archive", "consolidated.00", "模型 7B", "x" * 200])
def test_the_archive_s_folder_may_have_any_name(root: str, tmp_path: Path) -> None:
    found = open_torch(put(tmp_path / "x.pt", zip_of(pickled({"w": tensor()}), root=root)))
    assert found["w"].shape == (2, 3)


@pytest.mark.parametrize("padding", range(8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_data_at_any_place_are_read(dtype: torch.dtype, padding: int, tmp_path: Path) -> None:
    """Old zip files and the format before them align nothing; what is read can be computed with all the same."""
    tree = {"pad": torch.zeros(padding, dtype=torch.uint8), "w": values(dtype, 33, 17)}
    torch.save(tree, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    found, wanted = open_torch(tmp_path / "x.pt")["w"], tree["w"]
    assert equal(found, wanted)
    assert torch.cat([found, found[1:]]).equal(torch.cat([wanted, wanted[1:]]))
    assert found.T.clone().equal(wanted.T)
    assert found.to(torch.complex64).equal(wanted.to(torch.complex64))
    if dtype.is_floating_point:
        assert torch.allclose(found @ found[0], wanted @ wanted[0])


def test_a_storage_that_is_part_of_another_is_read(tmp_path: Path) -> None:
    """Files before torch 0.4: (key of the view, offset, size) stands at the end of the storage's id."""
    part = Storage(more=(("1", 2, 3),))
    content = pickled({"whole": tensor(Storage(more=(None,))), "part": tensor(part, 1, (2,), (1,))})
    found = open_torch(put(tmp_path / "x.pt", legacy_of(content, ["0"], struct.pack("<q6f", 6, *range(6)))))
    assert found["part"].tolist() == [3, 4]
    with pytest.raises(ValueError, match=r"shape \[3\], strides \[1\] and offset \[1\], expected a view within the 3 elements"):
        open_torch(put(tmp_path / "x.pt", zip_of(pickled({"w": tensor(part, 1, (3,), (1,))}))))
    with pytest.raises(ValueError, match="elements that their storage does not have"):
        open_torch(put(tmp_path / "x.pt", zip_of(pickled({"w": tensor(Storage(more=(("1", 4, 3),)))}))))


def test_a_file_of_a_big_endian_machine_in_the_old_format_is_read(tmp_path: Path) -> None:
    """torch always wrote that format little-endian, whatever the machine."""
    content = legacy_of(pickled({"w": tensor()}), ["0"], struct.pack("<q6f", 6, *range(6)), little_endian=False)
    assert open_torch(put(tmp_path / "x.pt", content))["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert open_torch(tmp_path / "x.pt")["w"].tolist() == [1, 1, 1]


# How it is opened.


@pytest.mark.parametrize("new", [True, False])
def test_tensors_outlive_the_reader_and_changing_them_leaves_the_file(new: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(1000)}, path, _use_new_zipfile_serialization=new)
    before = path.read_bytes()
    found = open_torch(path)["w"]
    found += 1
    assert found.sum() == 2000
    assert path.read_bytes() == before
    assert open_torch(path)["w"].sum() == 1000


def write_sparse(path: Path, layout: Any) -> None:
    """The file of a layout with nothing but holes for data."""
    with path.open("wb") as file:
        file.truncate(layout.size)
        for offset, content in layout.seal(dict.fromkeys(layout.specs, 0)):
            file.seek(offset)
            file.write(content)


def test_a_file_larger_than_the_memory_is_opened_at_once(tmp_path: Path) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    rows = 2 * memory // 8192
    layout = torch_layout("x.pth", {"w": ((rows, 4096), torch.float16), "v": ((3,), torch.float32)})
    assert layout.size > 1 << 32, "the zip archive needs 64-bit offsets"
    write_sparse(tmp_path / "x.pth", layout)
    file = open_torch_tensors(tmp_path / "x.pth")
    assert file.shapes == {"w": (rows, 4096), "v": (3,)}
    assert file.read("w", (0, rows - 2, rows)).sum() == 0
    assert file.read("v", None).tolist() == [0, 0, 0]


@pytest.mark.parametrize("new", [True, False])
def test_a_shard_of_a_7b_model_is_opened_in_milliseconds(new: bool, tmp_path: Path) -> None:
    tree = {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(4, 4, dtype=torch.float16) for i in range(291)}
    torch.save(tree, tmp_path / "x.bin", _use_new_zipfile_serialization=new)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        assert len(open_torch(tmp_path / "x.bin")) == 291
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.1


def test_pieces_are_views_of_the_whole(tmp_path: Path) -> None:
    wanted = values(torch.float32, 6, 4)
    torch.save({"w": wanted, "step": 3, "more": {"v": wanted}}, tmp_path / "x.bin")
    file = open_torch_tensors(tmp_path / "x.bin")
    assert (file.shapes, file.dtypes) == ({"w": (6, 4)}, {"w": torch.float32})
    whole, piece = file.read("w", None), file.read("w", (1, 1, 3))
    assert equal(whole, wanted)
    assert piece.equal(wanted[:, 1:3])
    assert piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_the_content_says_which_kind_of_file_it_is_not_the_name(tmp_path: Path) -> None:
    wanted = {"w": values(torch.float32, 2, 3)}
    torch.save(wanted, tmp_path / "torch.safetensors")
    torch.save(wanted, tmp_path / "legacy.safetensors", _use_new_zipfile_serialization=False)
    for size in (1, 300):  # headers of several lengths: their first byte may be any
        more = {f"{i:0{size}}": torch.zeros(1) for i in range(size)}
        safetensors.torch.save_file(wanted | more, tmp_path / f"safe{size}.bin")
        safetensors.torch.save_file(wanted | more, tmp_path / f"safe{size}.safetensors")
    for path in tmp_path.iterdir():
        assert equal(open_tensors(path).read("w", None), wanted["w"]), path.name


def test_names_are_text(tmp_path: Path) -> None:
    torch.save({0: torch.ones(1)}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="has a tensor under 0, expected names"):
        open_tensors(tmp_path / "x.bin")
