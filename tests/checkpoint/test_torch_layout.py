"""A file laid out by us is byte for byte what torch.save writes: the torch that is here, and older ones by their hashes."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_by_torch import DTYPES, FACTS, LARGE, counting, trees
from torch import Tensor

from pyalpaca.checkpoint.container.layout import FileLayout
from pyalpaca.checkpoint.container.tensor_file import raw_bytes
from pyalpaca.checkpoint.container.torch_layout import CONTAINERS, DEFAULT_CONTAINER, torch_layout

TREES = trees()
KNOWN = json.loads(FACTS.read_text())
WRITERS = {"torch1.13": ("1.13.1", "2.0.1"), "torch2.1": ("2.1.2", "2.6.0"), "torch2.7": ("2.7.1", "2.13.0")}
OLD = [(container, version) for container, versions in WRITERS.items() for version in versions]


def specs(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree as torch_layout wants it."""
    made = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            value = specs(value)
        made[key] = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
    return made


def flat(tree: Mapping[str, Any], way: str = "") -> dict[str, Tensor]:
    """{key in the layout: tensor}."""
    made = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            made.update(flat(value, f"{way}{key}/"))
        elif isinstance(value, Tensor):
            made[way + key] = value
    return made


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {key: zlib.crc32(raw_bytes(tensor)) for key, tensor in tensors.items()}


def written(layout: FileLayout, tensors: Mapping[str, Tensor]) -> bytes:
    """The file; its patches and tensors cover every byte once."""
    pieces = layout.seal(checksums(tensors)) + [(layout.places[key], bytes(raw_bytes(t))) for key, t in tensors.items()]
    file = io.BytesIO()
    for offset, piece in sorted(pieces, key=lambda p: (p[0], len(p[1]))):
        assert offset == file.tell()
        file.write(piece)
    assert file.tell() == layout.size
    return file.getvalue()


def ours(name: str, tree: Mapping[str, Any], container: str = DEFAULT_CONTAINER) -> bytes:
    return written(torch_layout(name, specs(tree), container), flat(tree))


def theirs(path: Path, tree: Mapping[str, Any]) -> bytes:
    torch.save(tree, path)
    return path.read_bytes()


@pytest.mark.parametrize("name", TREES)
def test_the_torch_that_is_here_writes_the_same(name, tmp_path):
    assert ours(name, TREES[name]) == theirs(tmp_path / name, TREES[name])


@pytest.mark.parametrize("container, version", OLD)
def test_other_torches_wrote_the_same(container, version):
    for name, tree in TREES.items():
        file = ours(name, tree, container)
        assert {"size": len(file), "sha256": hashlib.sha256(file).hexdigest()} == KNOWN[version][name], name


@pytest.mark.parametrize("container, version", [(c, v) for c, v in OLD if LARGE.keys() <= KNOWN[v].keys()])
@pytest.mark.parametrize("name", LARGE)
def test_beyond_four_gib_all_but_the_tensors_is_as_torch_wrote_it(name, container, version):
    known = KNOWN[version][name]
    layout = torch_layout(name, {key: (shape, getattr(torch, dtype)) for key, (shape, dtype) in LARGE[name].items()}, container)
    patches = layout.seal(dict(zip(LARGE[name], known["crcs"], strict=True)))
    assert layout.size == known["size"]
    assert list(layout.places.values()) == known["places"]
    assert hashlib.sha256(b"".join(piece for _, piece in patches)).hexdigest() == known["around"]


def test_every_form_was_compared_beyond_four_gib():
    assert {container for container, version in OLD if LARGE.keys() <= KNOWN[version].keys()} == set(CONTAINERS)


# Not empty: the key of a tensor is not the key of a dict of tensors.
KEYS = st.text(st.characters(exclude_characters="/", exclude_categories=("Cs",)), min_size=1, max_size=5)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple),
    max_leaves=8,
)
SHAPES = st.lists(st.integers(0, 4), max_size=4)
TENSORS = st.builds(lambda shape, dtype: counting(*shape, dtype=dtype), SHAPES, st.sampled_from(DTYPES))


@settings(max_examples=40, deadline=None)
@given(st.recursive(TENSORS | PLAIN, lambda inner: st.dictionaries(KEYS, inner, max_size=6), max_leaves=20))
def test_any_tree_is_written_as_torch_writes_it(tmp_path_factory, value):
    tree = {"first": counting(3), "value": value}
    assert ours("model.bin", tree) == theirs(tmp_path_factory.getbasetemp() / "model.bin", tree)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", TREES)
def test_torch_and_zip_tools_open_it(name, container, tmp_path):
    path = tmp_path / name
    path.write_bytes(ours(name, TREES[name], container))
    opened = torch.load(path, weights_only=True, mmap=True)
    torch.testing.assert_close(flat(opened), flat(TREES[name]), rtol=0, atol=0)
    assert specs(opened) == specs(TREES[name])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("container", CONTAINERS)
def test_tensors_are_aligned_and_listed_in_the_order_of_the_file(container):
    layout = torch_layout("many.tensors.pth", specs(TREES["many.tensors.pth"]), container)
    assert all(place % 64 == 0 for place in layout.places.values())
    assert list(layout.places.values()) == sorted(layout.places.values())
    assert list(layout.specs) == list(layout.places)


def test_keys_are_joined_by_slashes_and_those_of_a_flat_dict_stay():
    nested = torch_layout("a.pt", {"model": {"x.weight": ((2,), torch.half)}, "step": 3, "y": ((), torch.float)})
    assert dict(nested.specs) == {"model/x.weight": ((2,), torch.half), "y": ((), torch.float)}


def test_one_spec_given_twice_is_two_tensors():
    spec = ((2,), torch.float16)
    tensors = {"a": counting(2), "b": counting(2, start=7)}
    assert written(torch_layout("a.pt", dict.fromkeys("ab", spec)), tensors) == ours("a.pt", tensors)


def test_the_folder_of_the_file_does_not_matter():
    tree = TREES["consolidated.00.pth"]
    assert ours("release/mp.rank_00/consolidated.00.pth", tree) == ours("consolidated.00.pth", tree)


@pytest.mark.parametrize(
    "name, tree, container, message",
    [
        ("a.pth", {}, "torch3", "a.pth: container 'torch3' is unknown, expected one of torch2.7, torch2.1, torch1.13"),
        (".pth", {}, DEFAULT_CONTAINER, ".pth: has nothing before its suffix, expected a name like model.pth; choose another"),
        (
            "a.pth",
            {"model": {"x": ((1,), torch.complex64)}},
            DEFAULT_CONTAINER,
            "a.pth: model/x is complex64, expected one of float64, float32, .*; cast it",
        ),
        (
            "a.pth",
            {"model": {"args": [1, object()]}},
            DEFAULT_CONTAINER,
            "a.pth: model/args is a list, expected a tensor or a plain value; leave it out",
        ),
    ],
)
def test_what_cannot_be_written_is_named(name, tree, container, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        torch_layout(name, tree, container)
