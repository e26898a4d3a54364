"""The published performance table, of runs that have ended or still go: what a device did in a second, all steps but the first.

No torch here: `pyalpaca report` reads records and settings only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def throughput(records: Sequence[Mapping[str, float]], devices: int) -> dict[str, float]:
    """What a run did per device and second, over all its records but the first step, which warms up; keys as in `rates`."""
    timed = records[1:] or records
    seconds = sum(r["seconds"] for r in timed)
    samples = sum(r["global_batch_size"] for r in timed) / seconds / devices
    return {
        "seconds_per_step": seconds / len(timed),
        "samples_per_second_per_device": samples,
        "tokens_per_second_per_device": sum(r["global_batch_size"] * r["seq_length"] for r in timed) / seconds / devices,
        **{key: sum(r[key] * r["seconds"] for r in timed) / seconds for key in ("tflops", "model_tflops", "hfu", "mfu")},
    }


def performance_row(summary: Mapping[str, float], settings: Mapping[str, Any]) -> dict[str, str]:
    """A run's row by column; summary: as of `throughput`, and memory_bytes; settings: what train.json holds."""
    return {
        "devices": f"{settings['devices']} {settings['device']}",
        "parameters": _size(settings["parameters"]),
        "layout": _layout(settings),
        "batch": f"{settings['global_batch_size']}",
        "sequence": f"{settings['seq_length']}",
        "samples/s/p": f"{summary['samples_per_second_per_device']:.2f}",
        "tokens/s/p": f"{summary['tokens_per_second_per_device']:.2f}",
        "s/step": _number(summary["seconds_per_step"]),
        "TFLOPs": _number(summary["tflops"]),
        "HFU": f"{summary['hfu']:.1%}",
        "MFU": f"{summary['mfu']:.1%}",
        "memory": f"{summary['memory_bytes'] / 1e9:.2f} GB",
    }


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same columns as a Markdown table, its columns aligned."""
    names = list(rows[0])
    widths = [max(len(cell) for cell in (name, *(row[name] for row in rows))) for name in names]
    lines = (names, ["-" * width for width in widths], *(list(row.values()) for row in rows))
    return "\n".join("| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _number(value: float) -> str:
    """Two places after the point as published, more of what is small."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _layout(settings: Mapping[str, Any]) -> str:
    """tp4 sp pp2 zb-h1 dp1 zero1, as far as it is so."""
    tp, cp, pp = settings["tp"], settings["cp"], settings["pp"]
    words = [
        f"tp{tp}",
        "sp" if settings["sequence_parallel"] else "",
        f"pp{pp}",
        settings["schedule"] if settings["schedule"] != "1f1b" else "",
        f"dp{settings['devices'] // (tp * cp * pp)}",
        f"cp{cp}" if cp > 1 else "",
        f"zero{settings['zero']}" if settings["zero"] else "",
    ]
    return " ".join(word for word in words if word)


def _size(count: int) -> str:
    """Parameters as people say them: 13B, 97M."""
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"
