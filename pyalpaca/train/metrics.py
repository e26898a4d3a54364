"""What a run prints and records of each step: throughput and FLOPs, and the log line."""

from __future__ import annotations

from collections.abc import Mapping

from pyalpaca.model import LlamaConfig
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
