"""The results in print: the table on stdout, and the page that docs/benchmarks/convert.md is made of."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MOST_OVER_CP, MOST_BYTES, MOST_GROWTH, LEAST_OVER_PEFT, LEAST_MEMORY_OVER_PEFT = 1.6, 1.5e9, 1.1, 3.0, 10.0
"""What this engine is held to; the memory is that of a 7B, its growth that of twice the layers."""

Row = Mapping[str, Any]


def table(result: Mapping[str, Any]) -> str:
    """The rows as Markdown tables, every single timing below them."""
    rows = [row for row in result["rows"] if "peft" not in row["vs"]]
    parts = [_cases_table(rows), *(_peft_table(row) for row in result["rows"] if "peft" in row["vs"])]
    goals = _table(["held to", "found", ""], ([text, found, "yes" if met else "no"] for text, found, met in find_goals(result)))
    return "\n\n".join([*parts, goals, "\n".join(_timings(result["rows"]))])


def find_goals(result: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """(what is asked, what was found, whether that is enough), for all that this run can tell."""
    goals: list[tuple[str, str, bool]] = []
    rows = [row for row in result["rows"] if "peft" not in row["vs"]]

    def most(text: str, values: Iterable[tuple[float, str]], unit: str, limit: float) -> None:
        if found := list(values):
            value, name = max(found)
            goals.append((text, f"{value:.2f}{unit} ({name})", value <= limit))

    most(
        f"every case in at most {MOST_OVER_CP} x the time of cp, both flushed to the disk",
        ((row["ours_over"]["cp"], _short(row)) for row in rows if "cp" in row["ours_over"]),
        " x",
        MOST_OVER_CP,
    )
    if result["settings"]["scale"]["name"] == "7b":
        most(
            f"at most {MOST_BYTES / 1e9} GB of memory of its own at 7B",
            ((row["peak_bytes"] / 1e9, _short(row)) for row in rows if row["peak_bytes"]),
            " GB",
            MOST_BYTES / 1e9,
        )
    most(
        f"with twice the layers at most {MOST_GROWTH} x the memory",
        ((row["peak_bytes"] / row["half"]["peak_bytes"], _short(row)) for row in rows if _half_peak(row) and row["peak_bytes"]),
        " x",
        MOST_GROWTH,
    )
    for row in result["rows"]:
        if "peft" in row["vs"]:
            ratio = row["vs"]["peft"]
            goals.append((f"at least {LEAST_OVER_PEFT:g} x as fast as peft", f"{ratio:.2f} x", ratio >= LEAST_OVER_PEFT))
        if "memory_vs" in row:
            ratio = row["memory_vs"]["peft"]
            text = f"at most a tenth of peft's memory ({LEAST_MEMORY_OVER_PEFT:g} x less)"
            goals.append((text, f"{ratio:.2f} x less", ratio >= LEAST_MEMORY_OVER_PEFT))
    return goals


def page(result: Mapping[str, Any]) -> str:
    """The whole page: how to run it, what is measured and how, and the tables."""
    machine, settings, rates = result["machine"], result["settings"], result["limits"]
    scale = settings["scale"]
    shape = f"{scale['num_layers']} layers, width {scale['hidden_size']}, feed-forward {scale['intermediate_size']}"
    cache = (
        "Before each timing all its sources are read once, ours and cp's alike, so that the page cache holds what memory allows"
        if settings["cache"] == "warm"
        else "Before each timing its sources are dropped from the page cache, ours and cp's alike"
    )
    copying = (
        f"cp {rates['cp_bytes'] / 1e9:.2f} GB/s flushed to the disk and {rates['plain_cp_bytes'] / 1e9:.2f} GB/s not, "
        if "cp_bytes" in rates
        else ""
    )
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB of memory, " if machine["memory_bytes"] else ""
    sections = [
        "# Merging and converting",
        f"`pyalpaca bench convert --scale {scale['name']}` prints these tables and, as its last line, one JSON object with all "
        "of it; `--from FILE --markdown FILE` makes this page of such an object.",
        f"{machine['cpu']}, torch on {machine['threads']} of {machine['cores']} cores, {memory}{machine['filesystem']}, "
        f"{machine['system']}, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}; load "
        f"before the run {settings['load_before']}. "
        f"This machine's limits in the same run: {copying}memory copied at {rates['copy_bytes'] / 1e9:.0f} GB/s read and "
        f"written, sgemm at {rates['sgemm_flops'] / 1e9:.0f} GFLOP/s.",
        table(result),
        "## What is measured",
        f"The model is synthetic, {shape}, fp16, in the files of the real one: two .bin files, and the two adapters of "
        "Chinese-LLaMA-Plus (r 8) and Chinese-Alpaca-Plus (r 64) with embedding and head in full (49953 and 49954 rows) and "
        "their tokenizers. merge-hf and merge-pth merge both adapters, to .bin files cut as the base's and to Meta's .pth; "
        "hf-megatron cuts the base for tensor-parallel 4 and pipeline-parallel 2; megatron-hf goes back, to safetensors; "
        "hf-safetensors writes the .bin files as safetensors. A first run is compared with its source and does not count.",
        "**Time.** Each conversion is a fresh process; its seconds are those of the work without the imports, with every file "
        "flushed to the disk (fsync) before it counts as written. cp is `cp -r` of the folder that the conversion wrote, on the "
        "same disk, its copies flushed too; plain cp is the moment at which cp returns, with much of the copy still in memory. "
        f"{cache}; the share really found there stands in brackets, as mincore(2) tells it. Free memory is touched, too: a "
        "virtual machine hands it back to its host, and whoever comes after a pause would wait for it. Everybody runs once for "
        f"nothing, then {settings['repeats']} times in turn, the order turned round each time. The table has the medians, "
        'all timings stand below it. "x cp" is our time over cp\'s.',
        "**Memory.** The parent reads /proc/PID/status every 10 ms. A process's own memory is RssAnon + RssShmem: what it has "
        "allocated or written. The pages of files mapped read-only are left out: they are the page cache, which the system takes "
        "back at will. The highest value of all runs is given, with what the imports (Python, torch) take before the work begins "
        "beside it. VmHWM, the kernel's own high-water mark with the file pages, is in the JSON. The same case with half the "
        "layers shows what memory grows with: the largest tensor is the same "
        f"({settings['largest_tensor_bytes'] / 1e6:.0f} MB), the model is not.",
    ]
    if any("peft" in row["vs"] for row in result["rows"]):
        peft = settings["peft_scale"]
        sections.append(
            f"**peft.** A model of {peft['num_layers']} layers and width {peft['hidden_size']}, because peft holds all of it in "
            "memory: the base in safetensors, the two adapters, the result in safetensors. peft's side is "
            "`LlamaForCausalLM.from_pretrained(dtype=float16)`, then for each adapter `resize_token_embeddings` (without "
            "computing a mean for the new rows), `PeftModel.from_pretrained` and `merge_and_unload`, at last `save_pretrained`; "
            "ours is `convert(..., lora=[...])`. Ours is flushed to the disk, peft's is not. Both have the machine's threads."
        )
    return "\n\n".join(sections) + "\n"


def _cases_table(rows: Sequence[Row]) -> str:
    head = ["case / scale / cache", "seconds", "GB/s", "x cp", "x plain cp", "own memory", "of it imports", "half the layers"]
    return _table(
        head,
        (
            [
                row["name"],
                f"{row['seconds']:.3g}",
                f"{row['bytes_per_second'] / 1e9:.2f}",
                _times(row["ours_over"].get("cp")),
                _times(row["ours_over"].get("plain_cp")),
                _megabytes(row["peak_bytes"]),
                _megabytes(row["memory"] and row["memory"]["baseline"]),
                _megabytes(_half_peak(row)),
            ]
            for row in rows
        ),
    )


def _peft_table(row: Row) -> str:
    timings = row["timings"]
    body = [
        ["seconds, the work alone", _middle(timings["ours"]), _middle(timings["peft"]), _times(row["vs"]["peft"])],
        [
            "seconds, the imports included",
            _middle(timings["ours_process"]),
            _middle(timings["peft_process"]),
            _times(row["vs"]["peft_process"]),
        ],
    ]
    ours, peft = row["memory"], row["peft_memory"]
    if ours and peft:
        ratios = row["memory_vs"]
        above = [_megabytes(memory["own"] - memory["baseline"]) for memory in (ours, peft)]
        body += [
            ["own memory", _megabytes(ours["own"]), _megabytes(peft["own"]), _times(ratios["peft"])],
            ["own memory above that of the imports", *above, _times(ratios["peft_above_baseline"])],
            [
                "VmHWM, file pages included",
                _megabytes(ours["resident"]),
                _megabytes(peft["resident"]),
                _times(ratios["peft_resident"]),
            ],
        ]
    differing = row["differing_tensors"]
    same = "all tensors equal" if not differing else f"{differing} tensors differ, by at most {row['max_difference']:.2g}"
    return f"{_table([row['name'], 'ours', 'peft', 'peft over ours'], body)}\n\nThe two results: {same}."


def _timings(rows: Sequence[Row]) -> list[str]:
    lines = ["Every timing in seconds, in the order taken; in brackets the share of the sources in the page cache before:", ""]
    for row in rows:
        parts = []
        for who, label in (("ours", "ours"), ("cp", "cp"), ("plain_cp", "plain cp"), ("peft", "peft")):
            if who in row["timings"]:
                share = row["cached"].get(who)
                said = f" ({share:.0%})" if share is not None else ""
                parts.append(f"{label}{said} {', '.join(f'{value:.3g}' for value in row['timings'][who])}")
        parts.append(f"our processor time {row['cpu_seconds']:.3g}")
        if arithmetic := row.get("arithmetic_seconds"):
            parts.append(f"the products of the factors alone would take {arithmetic:.2g} at this machine's sgemm rate")
        lines.append(f"- {row['name']}: {'; '.join(parts)}")
    return lines


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _short(row: Row) -> str:
    return str(row["name"]).split("/")[0]


def _half_peak(row: Row) -> int | None:
    peak: int | None = row.get("half", {}).get("peak_bytes")
    return peak


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.0f} MB"


def _middle(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g}"
