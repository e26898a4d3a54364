"""The sha256 that a file would have, had another torch saved its tensors: the hash of a file that is nowhere written.

A file's sha256 covers all that torch.save writes around the tensors, which differs from one version of torch to another, and the
order of the tensors. All of it is known before it is written, so the published hash of the same weights can be met.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from tqdm import tqdm

from pyalpaca.checkpoint.container.layout import FileLayout, Patch
from pyalpaca.checkpoint.container.tensor_file import TensorFile, raw_bytes, spec_bytes
from pyalpaca.checkpoint.container.torch_layout import CONTAINERS, torch_layout

_CHUNK = 1 << 22
_MOST = 4
"""How many times the size of a file its tensors may take one by one: tensors may share bytes, but weights hardly do."""

_WRITERS = {
    "torch2.7": "torch 2.7 or newer",
    "torch2.1": "torch 2.1 to 2.6",
    "torch1.13": "torch 1.6 to 2.0",
    "legacy": "torch before 1.6",
}
# The modules of a LLaMA model in the order in which transformers has had them since 4.31, as have our writers. Before, and so
# when the published weights were made, down_proj stood before up_proj.
_FIRST = ("embed_tokens", "tok_embeddings")
_LAYER = (
    *("q_proj", "wq", "k_proj", "wk", "v_proj", "wv", "o_proj", "wo", "inv_freq"),
    *("gate_proj", "w1", "up_proj", "w3", "down_proj", "w2"),
    *("input_layernorm", "attention_norm", "post_attention_layernorm", "ffn_norm"),
)
_LAST = ("norm", "lm_head", "output")
_BEFORE_4_31 = {"up_proj": "down_proj", "w3": "w2", "down_proj": "up_proj", "w2": "w3"}


@dataclass(frozen=True)
class Container:
    """What stands around the tensors of a file. form: one of CONTAINERS, or `legacy`; folder: of its zip archive, if any."""

    form: str
    folder: str = ""

    @property
    def writer(self) -> str:
        return _WRITERS[self.form]


@dataclass(frozen=True)
class Resaved:
    """A hash that was met. differences: what is otherwise in the file itself, in words that follow its name."""

    sha256: str
    differences: str


@dataclass(frozen=True)
class _Candidate:
    name: str
    container: str
    reordered: bool
    layout: FileLayout
    patches: Sequence[Patch]


def container(path: Path) -> Container:
    """The container of a file that torch.save wrote and that could be opened."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return Container("legacy")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    folder = next(name.removesuffix("/data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl"))
    records = {name.removeprefix(f"{folder}/") for name in names}
    if records & {".format_version", ".storage_alignment"}:
        return Container("torch2.7", folder)
    return Container("torch2.1" if records & {"byteorder", ".data/serialization_id"} else "torch1.13", folder)


def resaved(file: TensorFile, own: Container, names: Collection[str], wanted: Collection[str]) -> Resaved | None:
    """Which of the `wanted` hashes a file would have with the same tensors in any container of torch.save, or None.

    file: opened, all its tensors at the top level. names: that the file may have had when it was saved.
    The tensors are also tried in the orders in which transformers has had those of a LLaMA model. Nothing is written, and no
    more than a tensor held in memory.
    """
    size = sum(spec_bytes((shape, file.dtypes[key])) for key, shape in file.shapes.items())
    if not names or not file.shapes or size > _MOST * file.path.stat().st_size:
        return None
    crcs = {}
    with tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1024, desc="crc32", disable=None) as bar:
        for key in file.shapes:
            data = raw_bytes(file.read(key, None))
            crcs[key] = zlib.crc32(data)
            bar.update(len(data))
    candidates = [c for c in _candidates(file, names, crcs) if not _is(file.path, c)]
    stop = Event()
    total = sum(c.layout.size for c in candidates)
    with (
        tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="other containers", disable=None) as bar,
        ThreadPoolExecutor(min(os.cpu_count() or 1, len(CONTAINERS))) as pool,
    ):
        try:
            for candidate, sha256 in zip(candidates, pool.map(lambda c: _sha256(file, c, stop, bar), candidates), strict=True):
                if sha256 in wanted:
                    return Resaved(sha256, _differences(own, candidate))
        finally:
            stop.set()
    return None


def _candidates(file: TensorFile, names: Iterable[str], crcs: dict[str, int]) -> Iterable[_Candidate]:
    """The files that the tensors may have been saved to, the likeliest first: the published ones are of torch 1.13."""
    for form in reversed(CONTAINERS):
        for name in names:
            for i, order in enumerate(_orders(list(file.shapes))):
                try:
                    layout = torch_layout(name, {key: (file.shapes[key], file.dtypes[key]) for key in order}, form)
                except ValueError:  # a dtype that no published file has
                    return
                yield _Candidate(name, form, i > 0, layout, layout.seal(crcs))


def _orders(keys: list[str]) -> list[list[str]]:
    """The order that the tensors have, then others that they may have had."""
    orders = [keys]
    for later in ({}, _BEFORE_4_31):
        try:
            made = sorted(keys, key=lambda key: _rank(key, later))
        except ValueError:  # a tensor that a LLaMA model has not
            return orders
        if made not in orders:
            orders.append(made)
    return orders


def _rank(key: str, swapped: dict[str, str]) -> tuple[int, int, int]:
    module = key.removesuffix(".weight").rpartition(".")[2]
    layer = re.search(r"\blayers\.(\d+)\.", key)
    if layer:
        return 1, int(layer[1]), _LAYER.index(swapped.get(module, module))
    return (0, 0, 0) if module in _FIRST else (2, 0, _LAST.index(module))


def _is(path: Path, candidate: _Candidate) -> bool:
    """Whether it is what the file is already: all around the tensors is the same, their checksums included."""
    if path.stat().st_size != candidate.layout.size:
        return False
    with path.open("rb") as file:
        for offset, data in candidate.patches:
            file.seek(offset)
            if file.read(len(data)) != data:
                return False
    return True


def _sha256(file: TensorFile, candidate: _Candidate, stop: Event, bar: Any) -> str:
    """The sha256 of a file as it is laid out; empty if it was stopped."""
    layout = candidate.layout
    tensors = [(place, key) for key, place in layout.places.items() if spec_bytes(layout.specs[key])]
    pieces: list[tuple[int, bytes | str]] = sorted([*candidate.patches, *tensors], key=lambda piece: piece[0])
    total, at = hashlib.sha256(), 0
    for place, piece in pieces:
        assert place == at, f"{layout.name}: {at - place} bytes are laid out twice or not at all"
        data = raw_bytes(file.read(piece, None)) if isinstance(piece, str) else memoryview(piece)
        at += len(data)
        for start in range(0, len(data), _CHUNK):
            if stop.is_set():
                return ""
            total.update(data[start : start + _CHUNK])
            bar.update(len(data[start : start + _CHUNK]))
    return total.hexdigest()


def _differences(own: Container, candidate: _Candidate) -> str:
    differences = []
    if own.form != candidate.container:
        differences.append(f"in the container of {own.writer}")
    if candidate.reordered:
        differences.append("with another order of tensors")
    if not differences and own.folder != candidate.name.rpartition(".")[0]:
        differences.append("with another folder in its archive")
    return ", ".join(differences) or "with its tensors stored in another way (shared, strided or beside other values)"
