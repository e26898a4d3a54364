"""What a run prints and records: the log line, metrics.jsonl, throughput and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyalpaca.model import LlamaConfig


def teraflops(factor: int, batch: int, seq_length: int, model: LlamaConfig, seconds: float, devices: int) -> float:
    """TFLOPs per device of one step (Narayanan et al. 2021, eq. 3), for a global batch.

    factor: 3 for the model's own work (MFU), 4 where the forward pass is computed twice (full recomputation, HFU).
    """
    L, h, V = model.num_layers, model.hidden_size, model.vocab_size
    work = 24 * factor * batch * seq_length * L * h**2 * (1 + seq_length / (6 * h) + V / (16 * L * h))
    return work / (seconds * devices * 1e12)


def throughput(records: Sequence[Mapping[str, float]], devices: int) -> dict[str, float]:
    """What a run did per device and second, over all its records but the first step, which warms up.

    tflops: all that was computed, recomputation included (HFU x peak); model_tflops: the model's own share (MFU x peak).
    """
    timed = records[1:] or records
    seconds = sum(r["seconds"] for r in timed)
    samples = sum(r["global_batch_size"] for r in timed) / seconds / devices
    return {
        "seconds_per_step": seconds / len(timed),
        "samples_per_second_per_device": samples,
        "tokens_per_second_per_device": sum(r["global_batch_size"] * r["seq_length"] for r in timed) / seconds / devices,
        "tflops": sum(r["tflops"] * r["seconds"] for r in timed) / seconds,
        "model_tflops": sum(r["model_tflops"] * r["seconds"] for r in timed) / seconds,
    }


def log_line(record: Mapping[str, float], steps: int) -> str:
    """The line of one iteration, with the fields and the order that readers of Megatron logs know."""
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
    )
    return " | ".join(f"{name}: {value}" if name != "iteration" else f"{name} {value}" for name, value in fields)
