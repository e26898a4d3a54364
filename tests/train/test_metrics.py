"""What a run prints: the published FLOPs, and the log line that readers of Megatron logs know."""

from __future__ import annotations

import re

import pytest

from pyalpaca.model import LlamaConfig
from pyalpaca.plan import teraflops
from pyalpaca.train import throughput
from pyalpaca.train.metrics import log_line

PUBLISHED = LlamaConfig(50048, 5120, 13824, 40, 40, 40, 128)
RECORD = {
    "step": 7,
    "samples": 112,
    "seconds": 0.25,
    "learning_rate": 3.125e-8,
    "global_batch_size": 16,
    "loss": 1.5,
    "loss_scale": 4096.0,
    "grad_norm": 2.25,
    "seq_length": 2048,
    "skipped": 1,
    "nan_steps": 2,
    "samples_per_second": 64.0,
    "samples_per_second_per_device": 8.0,
    "tokens_per_second_per_device": 16384.0,
    "tflops": 160.41,
    "model_tflops": 120.31,
    "hfu": 0.4531,
    "mfu": 0.3399,
    "memory_bytes": 57.2e9,
}


@pytest.mark.parametrize(("tokens_per_second", "published"), [(1556.77, 160.41), (1493.73, 153.91)])
def test_the_published_table(tokens_per_second: float, published: float) -> None:
    seconds = 256 * 256 / (tokens_per_second * 8)
    assert teraflops(4, 256, 256, PUBLISHED, seconds, 8) == pytest.approx(published, abs=0.005)


def test_the_log_line_has_the_known_fields_in_the_known_order() -> None:
    fields = [
        *("iteration", "consumed samples", "elapsed time per iteration (ms)", "learning rate", "global batch size", "lm loss"),
        *("loss scale", "grad norm", "actual seqlen", "number of skipped iterations", "number of nan iterations"),
        *("samples per second", "TFLOPs"),
        *("samples/s/p", "tokens/s/p", "HFU", "MFU", "memory"),  # ours, after those that readers know
    ]
    parts = log_line(RECORD, 100).split(" | ")
    assert [re.split(r":|  +", part)[0] for part in parts] == fields
    assert re.fullmatch(r"iteration +7/ +100", parts[0])
    assert parts[-3:] == ["HFU: 45.3%", "MFU: 34.0%", "memory: 57.20 GB"]
    assert parts[3] == "learning rate: 3.125E-08" and parts[5] == "lm loss: 1.500000E+00"


def test_a_loss_that_is_not_a_number_is_printed_all_the_same() -> None:
    assert "lm loss: NAN" in log_line({**RECORD, "loss": float("nan")}, 100)


def test_throughput_leaves_the_first_step_out() -> None:
    slow = {**RECORD, "seconds": 100.0}
    found = throughput([slow, RECORD, {**RECORD, "seconds": 0.75}], devices=8)
    assert found["seconds_per_step"] == 0.5
    assert found["samples_per_second_per_device"] == 32 / 1.0 / 8
    assert found["tokens_per_second_per_device"] == 32 * 2048 / 8
    assert found["tflops"] == pytest.approx(160.41) and found["model_tflops"] == pytest.approx(120.31)
    assert throughput([slow], devices=1)["seconds_per_step"] == 100.0
