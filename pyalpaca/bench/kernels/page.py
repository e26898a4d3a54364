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
    *("limit", "limit_seconds", "limit_share", "cold_limit_share", "peak_bytes", "page_faults"),
)
_OF_PEERS = ("seconds", "cold_seconds", "spread", "peak_bytes", "page_faults")


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


def _rows(rows: Sequence[Row]) -> str:
    head = ["operator / direction / dtype / shape", "ms", "spread", "cold ms", "GFLOP/s", "GB/s", "of the limit", "cold", "MB"]
    head += ["faults", "times faster than", "cold, than"]
    return _table(
        head,
        (
            [
                row["name"],
                _ms(row["seconds"]),
                f"{row['spread']:.0%}",
                _ms(row["cold_seconds"]),
                f"{row['flops_per_second'] / 1e9:.3g}",
                f"{row['bytes_per_second'] / 1e9:.3g}",
                f"{row['limit_share']:.0%} {row['limit']}",
                _percent(row["cold_limit_share"]),
                _megabytes(row["peak_bytes"]),
                str(row["page_faults"]),
                _ratios(row["vs"]),
                _ratios(row["vs_cold"]),
            ]
            for row in rows
        ),
    )


def _means(result: Mapping[str, Any]) -> str:
    peers = list(result["geomean"])
    if not peers:
        return ""
    body = [
        [name, *(f"{group[peer]:.2f}" if peer in group else "-" for peer in peers)]
        for name, group in [*result["geomean_by"].items(), ("all", result["geomean"])]
    ]
    return "Geometric means of the peer's time over ours, over the shapes:\n\n" + _table(["", *peers], body)


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
    shown = dict.fromkeys(row["name"].split("/")[0] for row in result["rows"])
    sections = [
        "# The operators",
        "`pyalpaca bench kernels` prints these tables and, as its last line, one JSON object with all of it; "
        "`--from FILE --markdown FILE` makes this page of such objects.",
        f"{machine['cpu']}, {machine['device']} ({machine['capability']}), torch on {machine['threads']} of {machine['cores']} "
        f"cores, {memory}{machine['system']}, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}.",
        _limits(result),
        *filter(None, [_targets(result), _means(result)]),
        "## Every row",
        _rows(result["rows"]),
        "## What is measured",
        "**Time.** Ours and the peers take turns in one process, the order turned round each time: each empties the caches by "
        "writing to four times the last level, is called once (`cold`), then again and again for 10 ms (`ms`). The numbers are "
        "medians; the spread is the middle half of the timings over the median. A call longer than 0.1 s is made once a round, "
        "one longer than 0.4 s once in all. The time includes giving up the result, and the page faults of fresh memory: "
        "`faults` is how many (ru_minflt) one of our calls takes. `times faster than` is the peer's time over ours.",
        "**Share of the limit.** The time that the flops take at the rate of the product, or the bytes at the rate of copying "
        "(of reading, where less than a tenth as much is written as read), whichever is longer, over the median. That rate is "
        "measured again in each row, where it takes its turn as the peers do. The bytes are those that must move, each tensor "
        "once. With everything in the caches a small shape may pass 100 %.",
        "**Memory.** MB is the growth of the resident memory (VmHWM, reset just before) in one call of ours, its result "
        "included, without what was held before, which may be blocks that the operators keep for their results.",
        _table(
            ["operator", "shape", "flops and bytes"],
            ([op.name, op.axes, op.formula] for op in (OPERATORS[name] for name in shown if name in OPERATORS)),
        ),
        "**Peers.** plain is the formula in plain torch (`pyalpaca.ops.reference`), compile the same through torch.compile for "
        "this very shape, measured in the first dtype and shape of an operator unless it is asked for by name. functional are "
        "torch's own functions (`F.rms_norm`, `F.silu`, `get_total_norm`), sdpa is `F.scaled_dot_product_attention` on the "
        "memory layout it likes best, fused and foreach are torch's AdamW, torch_bf16 and torch_float32 `F.linear` with "
        "everything in that dtype beforehand, transformers its own function of the LLaMA model.",
    ]
    return "\n\n".join(sections) + "\n"


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))


def _ratios(ratios: Mapping[str, float]) -> str:
    return ", ".join(f"{peer} {ratio:.3g}" for peer, ratio in ratios.items())


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.4g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.3g}"
