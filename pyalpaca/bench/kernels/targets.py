"""What the operators are held to, and how far the rows of a run are from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyalpaca.bench.means import geometric_mean, geometric_means

Row = Mapping[str, Any]
HALVES = ("bfloat16", "float16")
_LONG = ("llama7b/1024", "llama13b/1024", "llama7b/2048")


@dataclass(frozen=True)
class Target:
    """One line of what is asked.

    measure: what is taken of a row. `share`: of the limit; `vs`: the time of `peer` over ours; `memory`: its peak over
    ours, `workspace`: the same without the results; `float32`: our time in fp32 over that in this dtype. at_least: for every
    row, or for the geometric mean of them with `mean`.
    dtypes, directions, shapes: which rows it is about; empty means all.
    """

    operators: tuple[str, ...]
    measure: str
    at_least: float
    peer: str = ""
    mean: bool = False
    dtypes: tuple[str, ...] = ()
    directions: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()

    def covers(self, row: Row) -> bool:
        operator, direction, dtype, shape = row["name"].split("/", 3)
        return (
            operator in self.operators
            and (not self.dtypes or dtype in self.dtypes)
            and (not self.directions or direction in self.directions)
            and (not self.shapes or shape in self.shapes)
        )

    def text(self) -> str:
        where = ", ".join(filter(None, (" ".join(part) for part in (self.operators, self.directions, self.dtypes, self.shapes))))
        wanted = {
            "share": f"{self.at_least:.0%} of the limit",
            "vs": f"{self.at_least:g} x {self.peer}",
            "memory": f"{self.peer} takes {self.at_least:g} x our memory",
            "workspace": f"beside the results {self.peer} takes {self.at_least:g} x our memory",
            "float32": f"at most {1 / self.at_least:.2f} x the time of fp32",
        }
        return f"{where}: {wanted[self.measure]}{' in the geometric mean' if self.mean else ''}"


_NORM = ("rms_norm", "add_rms_norm")
_NORMS = ("llama7b/2048", "llama13b/8192")
_ROPES = ("llama7b/2048", "llama13b/2048")
_ADAMW = ("llama7b/attention", "width768/60m")
_ONE_TOKEN = ("llama7b/decode", "llama13b/decode")
_CACHES = ("llama7b/2048", "llama13b/2048", "grouped/8192")
_HEAD = ("linear_cross_entropy",)
_FLASH = ("flash_attention",)
_FLASH_SHAPES = ("llama7b/512", *_LONG)

TARGETS = (
    *(Target((name,), "share", 0.80, directions=("fwd",), shapes=_NORMS) for name in _NORM),
    *(Target((name,), "share", 0.70, directions=("bwd",), shapes=_NORMS) for name in _NORM),
    *(Target((name,), "vs", 8.0, peer="compile", mean=True, shapes=_NORMS) for name in _NORM),
    *(Target((name,), "share", 0.75, shapes=_ROPES) for name in ("rope", "rope_qk", "rope_qk_store", "swiglu")),
    *(Target((name,), "vs", 8.0, peer="compile", mean=True, shapes=_ROPES) for name in ("rope", "rope_qk", "swiglu")),
    Target(_FLASH, "share", 0.82, dtypes=("float32",), directions=("fwd",), shapes=_LONG),
    Target(_FLASH, "share", 0.75, dtypes=("float32",), directions=("fwd",), shapes=("llama7b/512",)),
    Target(_FLASH, "vs", 1.3, peer="sdpa", mean=True, dtypes=("float32",), directions=("fwd",), shapes=_FLASH_SHAPES),
    Target(_FLASH, "share", 0.75, dtypes=("float32",), directions=("bwd",), shapes=_LONG),
    Target(_FLASH, "share", 0.65, dtypes=("float32",), directions=("bwd",), shapes=("llama7b/512",)),
    Target(_FLASH, "vs", 1.3, peer="sdpa", mean=True, dtypes=("float32",), directions=("bwd",), shapes=_FLASH_SHAPES),
    Target(_FLASH, "float32", 1 / 1.15, dtypes=HALVES, shapes=_FLASH_SHAPES),
    *(
        Target(_FLASH, "vs", 7.0, peer="sdpa", mean=True, dtypes=(dtype,), directions=("bwd",), shapes=_FLASH_SHAPES)
        for dtype in HALVES
    ),
    Target(("linear",), "share", 0.85, dtypes=HALVES, shapes=_ONE_TOKEN),
    Target(("linear",), "vs", 20.0, peer="plain", mean=True, dtypes=("bfloat16",), shapes=_ONE_TOKEN),
    Target(("linear",), "share", 0.85, dtypes=HALVES, shapes=("llama7b/512",)),
    Target(("linear",), "vs", 50.0, peer="plain", mean=True, dtypes=("bfloat16",), shapes=("llama7b/512",)),
    Target(("linear_quantized",), "share", 0.85, shapes=(*_ONE_TOKEN, "llama7b/decode/64")),
    Target(("linear_quantized",), "vs", 20.0, peer="torch_bf16", mean=True, shapes=(*_ONE_TOKEN, "llama7b/decode/64")),
    Target(("linear_quantized",), "share", 0.85, shapes=("llama7b/512", "llama7b/512/64")),
    Target(("linear_quantized",), "vs", 50.0, peer="torch_bf16", mean=True, shapes=("llama7b/512", "llama7b/512/64")),
    Target(("cached_attention",), "share", 0.80, shapes=_CACHES),
    Target(("cached_attention",), "vs", 3.0, peer="sdpa", mean=True, shapes=_CACHES),
    Target(_HEAD, "share", 0.85, shapes=("alpaca7b/512", "width1024/4096")),
    *(
        Target(_HEAD, "vs", 1.15, peer="plain", mean=True, dtypes=(dtype,), shapes=("alpaca7b/512", "width1024/4096"))
        for dtype in ("float32", *HALVES)
    ),
    Target(_HEAD, "workspace", 10.0, peer="plain", shapes=("width1024/4096",)),
    Target(("adamw_",), "share", 0.85, shapes=_ADAMW),
    Target(("adamw_",), "vs", 1.5, peer="fused", mean=True, shapes=_ADAMW),
)


def judge(rows: Sequence[Row], targets: Iterable[Target] = TARGETS) -> list[dict[str, Any]]:
    """Of each target that the rows can tell something about: text, value found, the row it was found in, met or not.

    The value is the worst row's, or the geometric mean.
    """
    seconds = {row["name"]: row["seconds"] for row in rows}
    found = []
    for target in targets:
        values = {
            row["name"]: value for row in rows if target.covers(row) and (value := _value(target, row, seconds)) is not None
        }
        if values:
            worst = min(values, key=lambda name: values[name])
            value = geometric_mean(values.values()) if target.mean else values[worst]
            found.append(
                {
                    "target": target.text(),
                    "at_least": round(target.at_least, 3),
                    "found": round(value, 3),
                    "worst": worst,
                    "rows": len(values),
                    "met": value >= target.at_least,
                }
            )
    return found


def _value(target: Target, row: Row, seconds: Mapping[str, float]) -> float | None:
    value: float | None
    if target.measure == "share":
        value = row["limit_share"]
    elif target.measure == "vs":
        value = row["vs"].get(target.peer)
    elif target.measure == "memory":
        value = memory_ratio(row, target.peer)
    elif target.measure == "workspace":
        value = workspace_ratio(row, target.peer)
    else:
        operator, direction, _, shape = row["name"].split("/", 3)
        whole = seconds.get(f"{operator}/{direction}/float32/{shape}")
        value = None if whole is None else whole / row["seconds"]
    return value


def memory_ratio(row: Row, peer: str) -> float | None:
    """The peak memory of a peer over ours; None where it was not measured or is too little to tell."""
    theirs, ours = row["peers"].get(peer, {}).get("peak_bytes"), row["peak_bytes"]
    return theirs / ours if theirs and ours else None


def workspace_ratio(row: Row, peer: str) -> float | None:
    """The same of what is held beside the results."""
    theirs, ours = (_workspace(who) for who in (row["peers"].get(peer, {}), row))
    return theirs / ours if theirs and ours else None


def _workspace(measured: Mapping[str, Any]) -> int | None:
    peak = measured.get("peak_bytes")
    return None if peak is None else max(peak - measured["result_bytes"], 0)


def means(rows: Sequence[Row]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Geometric means of `vs` by peer, over all rows and over the shapes of each operator/direction/dtype."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault("/".join(row["name"].split("/")[:3]), []).append(row)
    return geometric_means(rows), {name: geometric_means(group) for name, group in groups.items()}
