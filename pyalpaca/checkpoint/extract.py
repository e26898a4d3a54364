"""A LoRA adapter out of a trained checkpoint: a run's factors as they are, or the best low-rank fit of what training changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyalpaca.checkpoint.adapter import check_output, write_adapter
from pyalpaca.checkpoint.canonical import DTYPES, Reader
from pyalpaca.checkpoint.container.tensor_file import read_json
from pyalpaca.checkpoint.native import native_tensors, read_native_meta
from pyalpaca.checkpoint.native_files import MANIFEST
from pyalpaca.checkpoint.open import open_checkpoint
from pyalpaca.model import lora_parameters, parameters

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_RANK = 64
_EXACT = 512  # matrices up to this side are decomposed exactly
_SPARE, _ROUNDS = 16, 4  # directions beyond the rank, and power iterations, of the randomised decomposition
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Change:
    """What training changed in one tensor, and how much of it the adapter keeps.

    whole: the tensor is stored whole, so all is kept. total, lost: squared Frobenius norms of the change, and of what is lost
    of it. error: the largest element lost, as a share of the largest change.
    """

    name: str
    whole: bool
    total: float = 0.0
    lost: float = 0.0
    error: float = 0.0

    @property
    def energy(self) -> float:
        """The share of the squared change that is kept."""
        return 1.0 - self.lost / self.total if self.total else 1.0


@dataclass(frozen=True)
class Extraction:
    """An adapter that was written. source: `run`, whose factors it holds, or `difference`, which it fits."""

    source: str
    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    changes: tuple[Change, ...]
    unchanged: int

    def summary(self) -> dict[str, Any]:
        """The counts, and the energy over all tensors with factors, for the last line of the command."""
        fitted = [c for c in self.changes if not c.whole]
        total = sum(c.total for c in fitted)
        return {
            "source": self.source,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "target_modules": list(self.target_modules),
            "factors": len(fitted),
            "whole": [c.name for c in self.changes if c.whole],
            "unchanged": self.unchanged,
            "energy": 1.0 - sum(c.lost for c in fitted) / total if total else 1.0,
            "least_energy": min((c.energy for c in fitted), default=1.0),
            "largest_error": max((c.error for c in fitted), default=0.0),
        }


def extract(
    trained: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    lora: Sequence[str | Path] = (),
    rank: int | None = None,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    weights: str = "safetensors",
    dtype: str | None = None,
    vocab_size: int | None = None,
    base_vocab_size: int | None = None,
) -> Extraction:
    """Write a PEFT adapter to `out` that turns the base into the trained model.

    A run that trained LoRA factors gives them as they are, with the tensors it trained whole; `base` is then only compared.
    Any other checkpoint, or one for which a `rank` is given, is compared with `base` (and the adapters `lora` merged into it):
    each projection in `targets` that differs gets the best factors of that rank, each embedding, head or norm is stored whole.

    alpha: of the adapter, by default its rank. dtype: of what is stored, by default float32 for fitted factors and otherwise
    as it is. vocab_size, base_vocab_size: real vocabularies, where a folder does not say it.
    Raises ValueError or FileNotFoundError, one sentence, and writes nothing, if the adapter could not say what changed.
    """
    check_output(out, weights)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    after = open_checkpoint(trained, vocab_size=vocab_size)
    before = None if base is None else open_checkpoint(base, lora=lora, vocab_size=base_vocab_size)
    if before is not None:
        _check_same_model(after, before)
    name = "" if base is None else str(base)
    if rank is None and _trained_factors(after):
        if alpha is not None or targets is not None:
            raise ValueError(f"{trained}: holds LoRA factors, which have their scale and targets; leave alpha and targets out")
        found, tensors = _of_run(after, before)
        name = name or str(read_native_meta(after.path).get("train_config", {}).get("model", ""))
    elif before is None:
        raise ValueError(f"{trained}: no base is given to compare it with, and it holds no LoRA factors itself; give --base")
    else:
        found, tensors = _of_difference(after, before, tuple(PROJECTIONS if targets is None else targets), rank, alpha, dtype)
    if dtype:
        tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    write_adapter(
        out,
        tensors,
        r=found.r,
        lora_alpha=found.lora_alpha,
        target_modules=found.target_modules,
        base_model=name,
        weights=weights,
        tokenizer=after.tokenizer,
    )
    return found


def _check_same_model(trained: Reader, base: Reader) -> None:
    """ValueError if the two differ in more than weights and a vocabulary that has grown: no adapter could say so."""
    same = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    for field in (*same, "rope_theta", "rope_scaling", "tie_embeddings"):
        ours, theirs = getattr(trained.config, field), getattr(base.config, field)
        if ours != theirs:
            raise ValueError(
                f"{trained.path}: {field} is {ours}, in {base.path} it is {theirs}; give the base from which it was trained"
            )
    if trained.config.vocab_size < base.config.vocab_size:
        raise ValueError(
            f"{trained.path}: has a vocabulary of {trained.config.vocab_size}, less than the {base.config.vocab_size} of "
            f"{base.path}; give the base from which it was trained"
        )


def _trained_factors(reader: Reader) -> list[str]:
    """The names of the LoRA factors in a native checkpoint; of none in any other layout, which hold them merged."""
    if reader.layout != "native":
        return []
    return [name for name in native_tensors(reader.path, "model").shapes if name.endswith((_A, _B))]


def _of_run(trained: Reader, base: Reader | None) -> tuple[Extraction, dict[str, Tensor]]:
    """The factors that a run trained, and what it trained whole: what its optimizer knows besides, or differs from `base`."""
    model, factors = native_tensors(trained.path, "model"), set(_trained_factors(trained))
    ranks = {model.shapes[name][0] for name in factors if name.endswith(_A)}
    if len(ranks) != 1:
        raise ValueError(f"{trained.path}: holds factors of ranks {sorted(ranks)}, an adapter has one; give --rank and --base")
    r, scale = ranks.pop(), float(read_json(trained.path / MANIFEST)["config"]["lora_scale"])
    moments = native_tensors(trained.path, "optimizer").shapes
    whole = [name for name in trained.names if f"exp_avg.{name}" in moments]
    if base is not None:
        frozen = [name for name in trained.names if not moments or name not in whole]
        changed = [
            name
            for name in tqdm(frozen, unit="tensor", desc="comparing", disable=None)
            if not _equal(model.read(name, None), base, name)
        ]
        stray = [name for name in changed if moments or name.split(".")[-2] in PROJECTIONS]
        if stray:
            raise ValueError(
                f"{base.path}: {stray[0]} is not that of {trained.path}, which did not train it; give the base of that run"
            )
        whole = whole if moments else changed
    elif not moments:
        raise ValueError(
            f"{trained.path}: lacks its optimizer's state, which says what was trained whole; give --base to compare"
        )
    tensors: dict[str, Tensor] = {}
    for name in trained.names:
        stem = name.removesuffix(".weight")
        for key in (stem + _A, stem + _B, *([name] if name in whole else [])):
            if key in factors or key == name:
                tensors[key] = model.read(key, None)
    fitted = [name for name in trained.names if name.removesuffix(".weight") + _A in factors]
    changes = [Change(name, whole=name in whole) for name in trained.names if name in whole or name in fitted]
    alpha, unchanged = _plain(scale * r), len(trained.names) - len(changes)
    return Extraction("run", r, alpha, _target_modules(trained, fitted), tuple(changes), unchanged), tensors


def _of_difference(
    trained: Reader, base: Reader, targets: tuple[str, ...], rank: int | None, alpha: float | None, dtype: str | None
) -> tuple[Extraction, dict[str, Tensor]]:
    """The best factors of what differs between two models; what can't be factors is stored whole."""
    table = parameters(trained.config)
    targeted = {p.name.replace(_A, ".weight") for p in lora_parameters(table, 1, targets) if p.name.endswith(_A)}
    if not targeted:
        raise ValueError(f"no targets to fit; name some of {', '.join(PROJECTIONS)}")
    narrow = min(sorted(targeted), key=lambda name: min(trained.shapes[name]))
    side = min(trained.shapes[narrow])
    r = min(_RANK, side) if rank is None else rank
    if not 1 <= r <= side:
        shape = " x ".join(str(n) for n in trained.shapes[narrow])
        raise ValueError(f"rank {r} is not possible for {narrow}, which is {shape}; choose from 1 to {side}")
    lora_alpha = _plain(float(r) if alpha is None else alpha)
    if not lora_alpha > 0:
        raise ValueError(f"alpha {lora_alpha} is not possible; choose a positive number")
    changes = {name: Change(name, whole=True) for name in _changed_whole(trained, base, targeted)}
    tensors: dict[str, Tensor] = {}
    for name in tqdm(sorted(targeted, key=trained.names.index), unit="tensor", desc="fitting", disable=None):
        weight = trained.read(name)
        if not _equal(weight, base, name):
            difference = weight.float() - base.read(name).float()
            changes[name] = _fit(name, difference, r, lora_alpha / r, DTYPES[dtype or "float32"], tensors)
    if not changes:
        raise ValueError(f"{trained.path}: equals {base.path} in every tensor, so there is nothing to extract; is it the model?")
    fitted = [name for name in trained.names if name in changes and not changes[name].whole]
    if not fitted:  # PEFT takes no adapter without factors
        fitted = sorted(targeted, key=trained.names.index)[:1]
        changes[fitted[0]] = _fit(fitted[0], torch.zeros(trained.shapes[fitted[0]]), r, 1.0, torch.float32, tensors)
    tensors.update({change.name: trained.read(change.name) for change in changes.values() if change.whole})
    order = {name: i for i, name in enumerate(trained.names)}
    listed = tuple(sorted(changes.values(), key=lambda c: order[c.name]))
    modules, unchanged = _target_modules(trained, fitted), len(trained.names) - len(listed)
    return Extraction("difference", r, lora_alpha, modules, listed, unchanged), tensors


def _changed_whole(trained: Reader, base: Reader, targeted: Iterable[str]) -> list[str]:
    """The tensors outside of `targeted` that differ. ValueError names projections among them.

    Of norms, all layers' if one layer's: modules_to_save names them by their common end.
    """
    others = [name for name in trained.names if name not in set(targeted)]
    changed = [
        name for name in tqdm(others, unit="tensor", desc="comparing", disable=None) if not _equal(trained.read(name), base, name)
    ]
    if stray := {name.split(".")[-2] for name in changed} & set(PROJECTIONS):
        names = ",".join(m for m in PROJECTIONS if m in stray)
        raise ValueError(f"{trained.path}: {names} differ from {base.path}, too, and are no targets; add them to --targets")
    modules = {name.split(".")[-2] for name in changed}
    return [name for name in others if name.split(".")[-2] in modules]


def _equal(tensor: Tensor, base: Reader, name: str) -> bool:
    """Whether a tensor is the base's; if their types differ, whether it is so but for the rounding to one of them."""
    if base.shapes[name] != tuple(tensor.shape):
        return False
    other = base.read(name)
    return torch.equal(tensor, other.to(tensor.dtype)) or torch.equal(tensor.to(other.dtype), other)


def _fit(name: str, difference: Tensor, r: int, scale: float, dtype: torch.dtype, tensors: dict[str, Tensor]) -> Change:
    """Put the best factors of `difference` into `tensors`; returns how good they are, as stored in `dtype`."""
    if not bool(difference.isfinite().all()):
        raise ValueError(f"{name} differs by NaN or infinity between the two models; use an earlier checkpoint")
    b, a = low_rank(difference, r)
    a, b = (a / scale**0.5).to(dtype), (b / scale**0.5).to(dtype)
    stem = name.removesuffix(".weight")
    tensors[stem + _A], tensors[stem + _B] = a, b
    total, largest = float(difference.square().sum(dtype=torch.float64)), float(difference.abs().max())
    lost = torch.addmm(difference, b.float(), a.float(), alpha=-scale)
    error = float(lost.abs().max()) / largest if largest else 0.0
    return Change(name, False, total, float(lost.square().sum(dtype=torch.float64)), error)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B, A), fp32 (O, rank) and (rank, I), whose product is the best approximation of a matrix fp32 (O, I) of this rank.

    The singular vectors, each times the root of its singular value. Of a large matrix they are found in a random subspace
    that power iterations turn to the largest ones (Halko et al. 2011, algorithms 4.4 and 5.1), always the same.
    """
    rows, columns = matrix.shape
    if min(rows, columns) <= max(_EXACT, 4 * rank):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    else:
        start = torch.randn(columns, rank + _SPARE, generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(matrix @ start).Q
        for _ in range(_ROUNDS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _target_modules(reader: Reader, fitted: Sequence[str]) -> tuple[str, ...]:
    """How target_modules names the modules with factors: by their kind where every layer has some, else in full."""
    kinds = {kind: [n for n in fitted if n.split(".")[-2] == kind] for kind in PROJECTIONS}
    names: list[str] = []
    for kind, of in kinds.items():
        names += [kind] if len(of) == reader.config.num_layers else [name.removesuffix(".weight") for name in of]
    return tuple(names)


def _plain(number: float) -> float:
    """A whole number as int, so that JSON says 16 and not 16.0 or 15.999999999999998."""
    return round(number) if abs(number - round(number)) < 1e-9 * abs(number) else number
