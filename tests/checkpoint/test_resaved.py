"""The hash of a published file is met from any file that holds its tensors, however they were saved; and from no other."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoint_makers import CONFIG, snapshot, tensors

from pyalpaca.checkpoint.container.torch_file import open_torch_tensors
from pyalpaca.checkpoint.container.torch_layout import CONTAINERS, torch_layout
from pyalpaca.checkpoint.meta import meta_name
from pyalpaca.checkpoint.plan import write_file
from pyalpaca.checkpoint.resaved import Resaved, container, resaved
from pyalpaca.model import parameters

NAME = "consolidated.00.pth"
MODEL = {meta_name(p.name)[0]: tensors()[p.name] for p in parameters(CONFIG)}
NEWER = "in the container of torch 2.7 or newer"
ORDER = "with another order of tensors"
STORED = "with its tensors stored in another way (shared, strided or beside other values)"


def write(path: Path, made: dict[str, torch.Tensor], form: str = "torch1.13") -> Path:
    path.parent.mkdir(exist_ok=True)
    write_file(torch_layout(path.name, {key: (tuple(t.shape), t.dtype) for key, t in made.items()}, form), path, made)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def published(tmp_path) -> str:
    """The hash of the model as torch 1.13 wrote it."""
    return sha256(write(tmp_path / "published" / NAME, MODEL))


def met(path: Path, *wanted: str, names: tuple[str, ...] = (NAME,)) -> Resaved | None:
    return resaved(open_torch_tensors(path), container(path), names, wanted)


def saved(folder: Path, tree: dict, name: str = NAME, **how) -> Path:
    """What the torch that is here saves."""
    torch.save(tree, folder / name, **how)
    return folder / name


def test_a_container_says_which_torch_wrote_it(tmp_path):
    forms = {form: write(tmp_path / form / NAME, MODEL, form) for form in CONTAINERS}
    forms |= {"legacy": saved(tmp_path, MODEL, _use_new_zipfile_serialization=False)}
    assert {form: container(path).form for form, path in forms.items()} == {form: form for form in (*CONTAINERS, "legacy")}
    path = saved(tmp_path, MODEL, "other.pth")
    assert (container(path).form, container(path).folder) == (CONTAINERS[0], "other")


@pytest.mark.parametrize("form", CONTAINERS)
def test_a_hash_of_any_container_is_met_from_the_torch_that_is_here(form, tmp_path):
    wanted = sha256(write(tmp_path / form / NAME, MODEL, form))
    found = met(saved(tmp_path, MODEL), wanted)
    # In its own container the file is what it is; its own hash was looked up before.
    assert found == (None if form == CONTAINERS[0] else Resaved(wanted, NEWER))


def test_a_file_of_torch_before_1_6(published, tmp_path):
    path = saved(tmp_path, MODEL, _use_new_zipfile_serialization=False)
    assert met(path, published) == Resaved(published, "in the container of torch before 1.6")


def test_tensors_in_another_order(published, tmp_path):
    backwards = dict(reversed(MODEL.items()))
    assert met(saved(tmp_path, backwards), published) == Resaved(published, f"{NEWER}, {ORDER}")
    assert met(write(tmp_path / NAME, backwards), published) == Resaved(published, ORDER)


def test_the_order_of_transformers_before_4_31(tmp_path):
    """It had down_proj before up_proj, and the merged models of the time have; ours are written in today's order."""
    names = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    within = [f"attention.{n}" if n in names[:4] else f"feed_forward.{n}" for n in names] + ["attention_norm", "ffn_norm"]
    old = ["tok_embeddings.weight"]
    old += [f"layers.{i}.{module}.weight" for i in range(CONFIG.num_layers) for module in within]
    old += ["norm.weight", "output.weight"]
    wanted = sha256(write(tmp_path / "old" / NAME, {key: MODEL[key] for key in old}))
    assert set(old) == MODEL.keys() and old != list(MODEL)
    assert met(saved(tmp_path, MODEL), wanted) == Resaved(wanted, f"{NEWER}, {ORDER}")


def test_a_hugging_face_shard_with_its_frequencies(tmp_path):
    made: dict[str, torch.Tensor] = {}
    for name, tensor in tensors().items():
        made[name] = tensor
        if name.endswith("o_proj.weight"):
            made[name.replace("o_proj.weight", "rotary_emb.inv_freq")] = torch.arange(4.0)
    name = "pytorch_model-00001-of-00001.bin"
    wanted = sha256(write(tmp_path / "published" / name, made))
    mixed = dict(sorted(made.items()))
    assert met(saved(tmp_path, mixed, name), wanted, names=(name,)) == Resaved(wanted, f"{NEWER}, {ORDER}")


def test_a_file_saved_under_another_name(published, tmp_path):
    names = ("adapter_model.bin", NAME)
    assert met(saved(tmp_path, MODEL, "alpaca.pth"), published, names=names) == Resaved(published, NEWER)
    assert met(write(tmp_path / "alpaca.pth", MODEL), published, names=names).differences == "with another folder in its archive"


def test_shared_and_strided_tensors_and_what_lies_beside_them(published, tmp_path):
    whole = torch.cat([t.reshape(-1) for t in MODEL.values()])
    parts = whole.split([t.numel() for t in MODEL.values()])
    shared = {key: part.view(t.shape) for (key, t), part in zip(MODEL.items(), parts, strict=True)}
    strided = {key: t.t().contiguous().t() if t.ndim == 2 else t.repeat_interleave(2)[::2] for key, t in MODEL.items()}
    assert not strided["output.weight"].is_contiguous() and strided["norm.weight"].stride() == (2,)
    parameter = {key: torch.nn.Parameter(t) for key, t in MODEL.items()}
    for tree in (shared, strided, parameter, OrderedDict(MODEL), {**MODEL, "epoch": 3, "optimizer": {"lr": torch.ones(2)}}):
        assert met(saved(tmp_path, tree), published) == Resaved(published, NEWER)
    here = sha256(saved(tmp_path, MODEL))
    assert met(saved(tmp_path, shared), here) == Resaved(here, STORED)


def test_another_weight_name_shape_or_type_meets_nothing(published, tmp_path):
    key = "layers.1.feed_forward.w2.weight"
    changed = MODEL[key].clone()
    changed[5, 7] += 1
    renamed = {("x" if k == key else k): t for k, t in MODEL.items()}
    for tree in (
        {**MODEL, key: changed},
        {**MODEL, key: MODEL[key].float()},
        {**MODEL, key: MODEL[key].t()},
        {**MODEL, key: MODEL[key].to(torch.float8_e4m3fn)},
        {k: t for k, t in MODEL.items() if k != key},
        renamed,
        {"epoch": 3},
        {},
    ):
        assert met(saved(tmp_path, tree), published) is None


def test_without_a_published_name_nothing_is_tried(published, tmp_path):
    assert met(saved(tmp_path, MODEL), published, names=()) is None


def test_a_number_shown_many_times_is_not_hashed_for_hours(published, tmp_path, monkeypatch):
    path = saved(tmp_path, {f"layers.{i}.wq": torch.zeros(1).expand(1000, 1000) for i in range(1000)})
    read = []
    monkeypatch.setattr("pyalpaca.checkpoint.resaved.raw_bytes", read.append)
    assert met(path, published) is None and not read


def test_nothing_is_written_and_the_file_stays_as_it_was(published, tmp_path):
    path = saved(tmp_path, MODEL)
    before = snapshot(tmp_path)
    assert met(path, published) is not None
    assert snapshot(tmp_path) == before
