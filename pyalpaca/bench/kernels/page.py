"""The results in print: the table on stdout, the comma-separated values, and the page docs/benchmarks/kernels.md."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pyalpaca.bench.kernels.records import OPERATORS
from pyalpaca.bench.kernels.targets import memory_ratio

Row = Mapping[str, Any]
_COLUMNS = (
    *("seconds", "cold_seconds", "spread", "calls", "flops", "bytes", "flops_per_second", "bytes_per_second"),
    *("limit", "limit_seconds", "limit_share", "cold_limit_share", "peak_bytes", "result_bytes", "page_faults"),
)
_OF_PEERS = ("seconds", "cold_seconds", "spread", "peak_bytes", "result_bytes", "page_faults")


def table(result: Mapping[str, Any]) -> str:
    """The rows, the geometric means and the targets as Markdown tables."""
    parts = [_limits(result), _rows(result["rows"]), _means(result), _targets(result)]
    return "\n\n".join(filter(None, parts))


def _limits(result: Mapping[str, Any]) -> str:
    limits = result["limits"]
    compute = next(name for name in limits if name.endswith("_flops"))
    probes = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in result["probes"].items())
    return (
        f"This machine's limits in the same run: {compute.removesuffix('_flops')} at {limits[compute] / 1e9:.0f} GFLOP/s, "
        f"copying at {limits['copy_bytes'] / 1e9:.1f} GB/s read and written, reading at {limits['read_bytes'] / 1e9:.1f} GB/s: "
        f"the best of {probes}."
    )


def _rows(rows: Sequence[Row], *, explained: bool = False) -> str:
    """A table for each operator: its rows, and a column for each peer. explained: with what its shapes and counts mean."""
    parts = []
    for name, of_operator in _by_operator(rows).items():
        known = OPERATORS.get(name) if explained else None
        parts += [
            f"### {name}",
            *([f"Shape: {known.axes}. Counted: {known.formula}."] if known else []),
            _operator_table(of_operator),
        ]
    return "\n\n".join(parts)


def _by_operator(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["name"].split("/")[0], []).append(row)
    return groups


def _operator_table(rows: Sequence[Row]) -> str:
    peers = list(dict.fromkeys(peer for row in rows for peer in row["vs"]))
    head = ["direction / dtype / shape", "ms", "cold ms", "spread", "GFLOP/s", "GB/s", "of the limit", "cold", "MB", "plain's MB"]
    head += ["faults", *(f"x {peer}" for peer in peers)]
    return _table(
        head,
        (
            [
                row["name"].split("/", 1)[1],
                _ms(row["seconds"]),
                _ms(row["cold_seconds"]),
                f"{row['spread']:.0%}",
                f"{row['flops_per_second'] / 1e9:.3g}",
                f"{row['bytes_per_second'] / 1e9:.3g}",
                f"{row['limit_share']:.0%} {row['limit']}",
                _percent(row["cold_limit_share"]),
                _megabytes(row["peak_bytes"]),
                _megabytes(row["peers"].get("plain", {}).get("peak_bytes")),
                str(row["page_faults"]),
                *(_ratio(row["vs"].get(peer), row["vs_cold"].get(peer)) for peer in peers),
            ]
            for row in rows
        ),
    )


def _means(result: Mapping[str, Any]) -> str:
    if not result["geomean"]:
        return ""
    groups = [*result["geomean_by"].items(), ("all", result["geomean"])]
    body = [[name, ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in group.items())] for name, group in groups if group]
    head = ["operator / direction / dtype", "times faster than"]
    return "Geometric means of the peer's time over ours, over the shapes:\n\n" + _table(head, body)


def _targets(result: Mapping[str, Any]) -> str:
    if not result["targets"] or result["quick"]:
        return ""
    body = (
        [target["target"], f"{target['found']:.3g}", str(target["rows"]), target["worst"], "yes" if target["met"] else "no"]
        for target in result["targets"]
    )
    return _table(["asked for", "found", "rows", "the worst of them", "met"], body)


def csv_table(result: Mapping[str, Any]) -> str:
    """One line a row: what was measured of ours, then of each peer, times and ratios; empty where there is none."""
    peers = list(result["geomean"])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    of_peers = [f"{peer}_{column}" for peer in peers for column in (*_OF_PEERS, "vs", "vs_cold", "vs_memory")]
    writer.writerow(["operator", "direction", "dtype", "shape", *_COLUMNS, *of_peers])
    for row in result["rows"]:
        cells: list[Any] = [*row["name"].split("/", 3), *(row[column] for column in _COLUMNS)]
        for peer in peers:
            cells += [row["peers"].get(peer, {}).get(column) for column in _OF_PEERS]
            cells += [row["vs"].get(peer), row["vs_cold"].get(peer), memory_ratio(row, peer)]
        writer.writerow(cells)
    return out.getvalue()


def page(result: Mapping[str, Any]) -> str:
    """The whole page: how to run it, the machine, the tables, and how all of it was measured."""
    machine = result["machine"]
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB of memory, " if machine["memory_bytes"] else ""
    sections = [
        "# The operators",
        "`pyalpaca bench kernels` prints these tables and, as its last line, one JSON object with all of it; "
        "`--from FILE --markdown FILE` makes this page of such objects.",
        f"{machine['cpu']}, {machine['device']} ({machine['capability']}), torch on {machine['threads']} of {machine['cores']} "
        f"cores, {memory}{machine['system']}, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}.",
        _limits(result),
        *filter(None, [_targets(result), _means(result)]),
        "## Every row",
        "`x peer` is the peer's time over ours, in parentheses with emptied caches; MB is the most memory that a call took.",
        _rows(result["rows"], explained=True),
        "## What is measured",
        "**Time.** Ours and the peers take turns in one process, the order turned round each time: each empties the caches by "
        "writing to four times the last level, is called once (`cold`), then again and again for 10 ms (`ms`). The numbers are "
        "medians; the spread is the middle half of the timings over the median. A call longer than 0.1 s is made once a round, "
        "one longer than 0.4 s is timed once in all. Everybody's inputs lie on huge pages, as the weights and caches of `train` "
        "and `generate` do. The time includes giving up the result, and the page faults of fresh memory: `faults` is how many "
        "(ru_minflt) one of our calls takes.",
        "**Share of the limit.** The time that the flops take at the rate of the product, or the bytes at the rate of copying "
        "(of reading, where less than a tenth as much is written as read), whichever is longer, over the median. That rate is "
        "measured again in each row, where it takes its turn as the peers do. The bytes are those that must move, each tensor "
        "once. With everything in the caches a small shape may pass 100 %.",
        "**Memory.** MB is the growth of the resident memory (VmHWM, reset just before) in one call, its result included, inputs "
        "not. What malloc and the pool of the operators hold for later is given back first, so that ours and the peers' are "
        "counted as in a fresh process; the calls that are timed afterwards find the pool filled, as in training. Scratch memory "
        "that threads keep from call to call, of our kernels or of MKL's, some MB, is not in it.",
        "**Peers.** plain is the formula in plain torch (`pyalpaca.ops.reference`), compile the same through torch.compile for "
        "this very shape, measured in the first dtype and shape of an operator unless it is asked for by name. functional are "
        "torch's own functions (`F.rms_norm`, `F.silu`, `get_total_norm`), sdpa is `F.scaled_dot_product_attention` on the "
        "memory layout it likes best, fused and foreach are torch's AdamW, torch_bf16 and torch_float32 `F.linear` with "
        "everything in that dtype beforehand, torch_int8 and torch_int4 torch's own products with packed integers, transformers "
        "its own function of the LLaMA model (its loss is the plain one: all logits, in fp32).",
    ]
    return "\n\n".join(sections) + "\n"


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))


def _ratio(warm: float | None, cold: float | None) -> str:
    return "-" if warm is None else f"{warm:.3g}" + (f" ({cold:.3g})" if cold is not None else "")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.4g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.3g}"
