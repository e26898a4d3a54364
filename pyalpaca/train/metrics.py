"""What a run prints and records: throughput and FLOPs, the log line, and the row of the published table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyalpaca.model import LlamaConfig, parameters
from pyalpaca.parallel import Mesh
from pyalpaca.plan import computed_twice, teraflops
from pyalpaca.train.config import TrainConfig


def rates(
    config: TrainConfig, seq_length: int, model: LlamaConfig, seconds: float, devices: int, peak: float
) -> dict[str, float]:
    """What one step of `seconds` did per second, and per device of `peak` TFLOPs.

    tflops: all that was computed, recomputation included, of which hfu is the share of the peak; model_tflops: the model's own
    work, of which mfu is.
    """
    batch = config.global_batch_size
    twice = computed_twice(model.num_layers, config.recompute, config.recompute_every)
    tflops, model_tflops = (teraflops(factor, batch, seq_length, model, seconds, devices) for factor in (3 + twice, 3))
    return {
        "samples_per_second": batch / seconds,
        "samples_per_second_per_device": batch / seconds / devices,
        "tokens_per_second_per_device": batch * seq_length / seconds / devices,
        "tflops": tflops,
        "model_tflops": model_tflops,
        "hfu": tflops / peak,
        "mfu": model_tflops / peak,
    }


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


def log_line(record: Mapping[str, float], steps: int) -> str:
    """The line of one iteration: the fields and the order that readers of Megatron logs know, then what is ours."""
    fields = (
        ("iteration", f"{record['step']:8.0f}/{steps:8d}"),
        ("consumed samples", f"{record['samples']:12.0f}"),
        ("elapsed time per iteration (ms)", f"{record['seconds'] * 1000:.1f}"),
        ("learning rate", f"{record['learning_rate']:.3E}"),
        ("global batch size", f"{record['global_batch_size']:5.0f}"),
        ("lm loss", f"{record['loss']:.6E}"),
        ("loss scale", f"{record['loss_scale']:.1f}"),
        ("grad norm", f"{record['grad_norm']:.3f}"),
        ("actual seqlen", f"{record['seq_length']:5.0f}"),
        ("number of skipped iterations", f"{record['skipped']:3.0f}"),
        ("number of nan iterations", f"{record['nan_steps']:3.0f}"),
        ("samples per second", f"{record['samples_per_second']:.3f}"),
        ("TFLOPs", f"{record['tflops']:.2f}"),
        ("samples/s/p", f"{record['samples_per_second_per_device']:.3f}"),
        ("tokens/s/p", f"{record['tokens_per_second_per_device']:.2f}"),
        ("HFU", f"{record['hfu']:.1%}"),
        ("MFU", f"{record['mfu']:.1%}"),
        ("memory", f"{record['memory_bytes'] / 1e9:.2f} GB"),
    )
    return " | ".join(f"{name}: {value}" if name != "iteration" else f"{name} {value}" for name, value in fields)


def performance_table(summary: Mapping[str, Any], model: LlamaConfig, config: TrainConfig, mesh: Mesh) -> str:
    """The published table with this run's row: Markdown, a device's rates over all steps but the first."""
    row = {
        "devices": f"{mesh.world} {mesh.device.type}",
        "parameters": _size(model),
        "layout": _layout(config, mesh),
        "batch": f"{config.global_batch_size}",
        "sequence": f"{config.seq_length}",
        "samples/s/p": f"{summary['samples_per_second_per_device']:.2f}",
        "tokens/s/p": f"{summary['tokens_per_second_per_device']:.2f}",
        "s/step": f"{summary['seconds_per_step']:.2f}",
        "TFLOPs": f"{summary['tflops']:.2f}",
        "HFU": f"{summary['hfu']:.1%}",
        "MFU": f"{summary['mfu']:.1%}",
        "memory": f"{summary['memory_bytes'] / 1e9:.2f} GB",
    }
    widths = [max(len(name), len(value)) for name, value in row.items()]
    lines = (row.keys(), ("-" * width for width in widths), row.values())
    return "\n".join("| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _layout(config: TrainConfig, mesh: Mesh) -> str:
    """tp4 sp pp2 zb-h1 dp1 zero1, as far as it is so."""
    words = [
        f"tp{mesh.tp}",
        "sp" if config.sequence_parallel else "",
        f"pp{mesh.pp}",
        config.schedule if config.schedule != "1f1b" else "",
        f"dp{mesh.dp}",
        f"cp{mesh.cp}" if mesh.cp > 1 else "",
        f"zero{config.zero}" if config.zero else "",
    ]
    return " ".join(word for word in words if word)


def _size(model: LlamaConfig) -> str:
    """Parameters as people say them: 13B, 97M."""
    count = sum(math.prod(p.shape) for p in parameters(model))
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"
