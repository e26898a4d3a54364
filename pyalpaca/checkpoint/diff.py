"""Two checkpoints tensor by tensor: how far apart their values are, in any two layouts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from pyalpaca.checkpoint.canonical import Reader
from pyalpaca.checkpoint.container.tensor_file import dtype_name

_CHUNK = 1 << 22  # elements compared at a time, so that what is computed stays small beside the tensor
_HALVES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class TensorDiff:
    """How one tensor of A differs from B's of the same name.

    reason: empty if equal, else what differs, in words.
    missing: only one of the two has it. compared: elements that could be compared, 0 if missing or of another shape.
    max, mean: absolute difference; infinite or NaN where a value is so in one of them only. total: mean times compared.
    """

    name: str
    reason: str
    missing: bool = False
    compared: int = 0
    max: float = 0.0
    total: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.compared if self.compared else 0.0

    @property
    def equal(self) -> bool:
        return not self.reason


def diff(a: Reader, b: Reader) -> Iterator[TensorDiff]:
    """Compare tensor by tensor, those of A first, then what only B has; at any time one tensor of each is in memory.

    Values are compared as numbers in float32 (float64 where one of them is): 0 equals -0, and NaN equals NaN in the same place.
    Another dtype is a difference, even with the same values.
    """
    for name in tqdm([*a.names, *(n for n in b.names if n not in a.shapes)], unit="tensor", desc="diff", disable=None):
        if name not in b.shapes or name not in a.shapes:
            yield TensorDiff(name, f"missing in {'A' if name not in a.shapes else 'B'}", missing=True)
        elif a.shapes[name] != b.shapes[name]:
            yield TensorDiff(name, f"shape {_dims(a.shapes[name])} in A, {_dims(b.shapes[name])} in B")
        else:
            yield _compare(name, a.read(name), b.read(name))


def diff_summary(found: Iterable[TensorDiff]) -> dict[str, int | float | None]:
    """Counts of tensors, and the differences over all elements compared: None (JSON has no other word) where not finite."""
    entries = list(found)
    compared = [d for d in entries if d.compared]
    total = sum(d.compared for d in compared)
    largest = _largest(d.max for d in compared)
    mean = math.fsum(d.total for d in compared) / total if total and math.isfinite(largest) else largest
    return {
        "tensors": len(entries),
        "equal": sum(d.equal for d in entries),
        "different": sum(not d.equal and not d.missing for d in entries),
        "max_difference": largest if compared and math.isfinite(largest) else None,
        "mean_difference": mean if compared and math.isfinite(mean) else None,
        "missing": sum(d.missing for d in entries),
    }


def _compare(name: str, a: Tensor, b: Tensor) -> TensorDiff:
    reasons = [f"dtype {dtype_name(a.dtype)} in A, {dtype_name(b.dtype)} in B"] if a.dtype != b.dtype else []
    exact = torch.float32 if a.dtype in _HALVES and b.dtype in _HALVES else torch.float64
    count = a.numel()
    differing, lone_nan, infinite, total, largest = 0, 0, 0, 0.0, [0.0]
    for one, two in zip(a.reshape(-1).split(_CHUNK), b.reshape(-1).split(_CHUNK), strict=True):
        if one.dtype == two.dtype and torch.equal(one, two):
            continue
        x, y = one.to(exact), two.to(exact)
        unlike = (x != y) & ~(x.isnan() & y.isnan())
        x, y = x[unlike], y[unlike]
        if not x.numel():
            continue
        gap = (x - y).abs()
        differing += x.numel()
        lone_nan += int(gap.isnan().sum())
        infinite += int((x.isinf() | y.isinf()).sum())
        total += float(gap.sum(dtype=torch.float64))
        largest.append(float(gap.max()))  # NaN if one is
    if differing:
        reasons.append(f"{differing} of {count} values")
    if lone_nan:
        reasons.append(f"{lone_nan} NaN in one only")
    if infinite:
        reasons.append(f"{infinite} infinite in one only or of the other sign")
    return TensorDiff(name, ", ".join(reasons), False, count, _largest(largest), total)


def _largest(values: Iterable[float]) -> float:
    """The largest, NaN if one is NaN, 0 of none; Python's max would depend on the order."""
    known = list(values)
    return math.nan if any(math.isnan(v) for v in known) else max(known, default=0.0)


def _dims(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)
