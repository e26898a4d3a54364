"""How fast the C++ operators are beside plain torch: medians, taken in turn, of one run.

    python tests/ops/speed.py [--dtype float32 bfloat16 float16] [--operator rms_norm rope flash_attention]

Prints a table; the last line is one JSON object. `vs` is the peer's time over ours: eager is the same formula in plain torch,
sdpa is F.scaled_dot_product_attention, functional is F.rms_norm. `limit_share` is the share of this machine's own sgemm rate
(attention, counting only what causal attention must multiply) or copy bandwidth (rms_norm, rope).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyalpaca.bench.machine import limits, machine
from pyalpaca.ops import backend, flash_attention, rms_norm, rope

Function = Callable[..., Tensor]
NORM_SHAPES = {"llama7b/2048": (2048, 4096), "small/128": (2, 64, 256)}
HEAD_SHAPES = {"llama7b/512": (1, 512, 32, 128), "llama7b/1024": (1, 1024, 32, 128), "small/64": (2, 64, 4, 64)}
ROPE_SHAPES = {"llama7b/2048": (1, 2048, 32, 128), "small/64": (2, 64, 4, 64)}


@dataclass(frozen=True)
class Job:
    """One operator at one shape: ours first among the functions, then the peers, each of the same inputs."""

    name: str
    functions: dict[str, Function]
    inputs: list[Tensor]
    limit: str
    forward_cost: float  # flops or bytes
    backward_cost: float


def under(name: str, function: Function) -> Function:
    def call(*arguments: Tensor) -> Tensor:
        with backend(name):
            return function(*arguments)

    return call


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA on the layout it likes best: the inputs of this call are already (B, H, S, d) in memory."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def jobs(operators: Sequence[str], dtype: torch.dtype) -> Iterator[Job]:
    size, name = dtype.itemsize, str(dtype).removeprefix("torch.")
    if "rms_norm" in operators:
        for label, shape in NORM_SHAPES.items():
            x, weight = torch.randn(shape).to(dtype), torch.ones(shape[-1]).to(dtype)
            functions = {
                "ours": under("cpp", lambda x, w: rms_norm(x, w, 1e-6)),
                "eager": under("reference", lambda x, w: rms_norm(x, w, 1e-6)),
                "functional": lambda x, w: F.rms_norm(x, (w.shape[0],), w, 1e-6),
            }
            yield Job(f"rms_norm/{{}}/{name}/{label}", functions, [x, weight], "copy", 2 * x.numel() * size, 3 * x.numel() * size)
    if "rope" in operators:
        for label, shape in ROPE_SHAPES.items():
            x, angle = torch.randn(shape).to(dtype), torch.randn(shape[1], shape[3] // 2)
            turn = partial(rope, cos=angle.cos(), sin=angle.sin())
            functions = {"ours": under("cpp", turn), "eager": under("reference", turn)}
            yield Job(f"rope/{{}}/{name}/{label}", functions, [x], "copy", 2 * x.numel() * size, 2 * x.numel() * size)
    if "flash_attention" in operators:
        for label, shape in HEAD_SHAPES.items():
            batch, length, heads, head_dim = shape
            inputs = [torch.randn(batch, heads, length, head_dim).to(dtype).transpose(1, 2) for _ in range(3)]
            flops = 2.0 * batch * heads * length * length * head_dim
            functions = {
                "ours": under("cpp", flash_attention),
                "eager": under("reference", flash_attention),
                "sdpa": heads_first,
            }
            yield Job(f"flash_attention/{{}}/{name}/{label}", functions, inputs, "sgemm", flops, 2.5 * flops)


def medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The median seconds of each call, one after another in turn, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def backward_call(function: Function, inputs: list[Tensor]) -> Callable[[], object]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    gradient = torch.randn(out.shape).to(out.dtype)
    return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)


def measure(operators: Sequence[str], dtypes: Sequence[torch.dtype], seconds: float = 1.0) -> Iterator[dict[str, Any]]:
    """One row for each operator, direction, dtype and shape."""
    rates = limits()
    for dtype in dtypes:
        for job in jobs(operators, dtype):
            with torch.no_grad():
                forward = medians({name: partial(f, *job.inputs) for name, f in job.functions.items()}, seconds)
            backward = medians({name: backward_call(f, job.inputs) for name, f in job.functions.items()}, seconds)
            for direction, times, cost in (("fwd", forward, job.forward_cost), ("bwd", backward, job.backward_cost)):
                ours = times.pop("ours")
                yield {
                    "name": job.name.format(direction),
                    "seconds": float(f"{ours:.4g}"),
                    "limit": job.limit,
                    "limit_share": round(cost / ours / rates["sgemm_flops" if job.limit == "sgemm" else "copy_bytes"], 3),
                    "vs": {peer: round(other / ours, 2) for peer, other in times.items()},
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", nargs="+", choices=names, default=names, help="dtypes to measure")
    operators = ["rms_norm", "rope", "flash_attention"]
    parser.add_argument("--operator", nargs="+", choices=operators, default=operators, help="operators to measure")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each operator, shape and direction")
    options = parser.parse_args()
    print("| operator / direction / dtype / shape | ms | share of limit | times faster than |\n|---|---|---|---|")
    rows = []
    for row in measure(options.operator, [getattr(torch, name) for name in options.dtype], options.seconds):
        rows.append(row)
        peers = ", ".join(f"{peer} {ratio}" for peer, ratio in row["vs"].items())
        print(
            f"| {row['name']} | {row['seconds'] * 1e3:.3f} | {row['limit_share']:.0%} of {row['limit']} | {peers} |", flush=True
        )
    peers = sorted({peer for row in rows for peer in row["vs"]})
    means = {p: math.exp(statistics.fmean(math.log(r["vs"][p]) for r in rows if p in r["vs"])) for p in peers}
    geomean = {peer: round(mean, 2) for peer, mean in means.items()}
    print(json.dumps({"bench": "ops", "machine": machine(), "limits": limits(), "rows": rows, "geomean": geomean}))


if __name__ == "__main__":
    main()
