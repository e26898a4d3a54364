"""The operators on torch's device npu, held to plain torch in float64: `python tests/ascend/on_the_device.py`, no argument.

PYALPACA_BACKEND=reference in the environment runs them in plain torch on the same device.
Runs on a machine with an NPU as it does on the simulated one. The last line says what was compared.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
import torch_npu  # noqa: F401  (torch's device npu)
from ops_cases import TOLERANCE, assert_near, random

from pyalpaca.ops import backend, flash_attention, npu, reference, rms_norm, rope, swiglu


def with_gradients(function: object, *inputs: Tensor) -> list[Tensor]:
    """The result and, for a fixed gradient of it, those of the inputs, on the processor in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)  # type: ignore[operator]
    dy = random(*y.shape, seed=9).to(y.device, y.dtype)
    return [x.cpu().double() for x in (y.detach(), *torch.autograd.grad(y, leaves, dy))]


def compare(name: str, dtype: torch.dtype, found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (x, wanted) in enumerate(zip(found, expected, strict=True)):
        assert_near(x.to(dtype), wanted, TOLERANCE[dtype], f"{name} {dtype} {i}")


def check_rms_norm(dtype: torch.dtype) -> None:
    for shape in ((2, 9, 256), (3, 520), (0, 64), (5, 4100)):
        x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
        found = with_gradients(lambda x, w: rms_norm(x, w, 1e-5), x.to("npu"), weight.to("npu"))
        expected = with_gradients(lambda x, w: reference.rms_norm(x, w, 1e-5), x.double(), weight.double())
        compare("rms_norm", dtype, found, expected)


def check_rope(dtype: torch.dtype) -> None:
    for heads, head_dim, batched in ((5, 128, False), (4, 64, True)):
        fused = random(2, 7, 3 * heads, head_dim, dtype=dtype)  # the middle third is a view, as out of a projection
        angle = random(*((2, 7) if batched else (7,)), head_dim // 2, seed=2)
        part = slice(heads, 2 * heads)
        cos, sin = angle.cos().to("npu"), angle.sin().to("npu")
        found = with_gradients(lambda x, cos=cos, sin=sin, part=part: rope(x[:, :, part], cos, sin), fused.to("npu"))
        c, s = angle.cos().double(), angle.sin().double()
        expected = with_gradients(lambda x, c=c, s=s, part=part: reference.rope(x[:, :, part], c, s), fused.double())
        compare("rope", dtype, found, expected)


def check_swiglu(dtype: torch.dtype) -> None:
    for shape in ((2, 9, 256), (3, 520), (0, 64), (5, 11008)):
        gate, up = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
        found = with_gradients(swiglu, gate.to("npu"), up.to("npu"))
        compare("swiglu", dtype, found, with_gradients(reference.swiglu, gate.double(), up.double()))


def check_flash_attention(dtype: torch.dtype) -> None:
    for queries, keys, heads, kv_heads, head_dim, causal in (
        (33, 33, 4, 2, 64, True),
        (5, 70, 2, 2, 128, False),
        (1, 40, 4, 1, 64, True),
    ):
        q, *kv = (
            random(2, n, h, head_dim, dtype=dtype, seed=i) for i, (n, h) in enumerate([(queries, heads), *[(keys, kv_heads)] * 2])
        )
        offset, scale = keys - queries, head_dim**-0.5
        options = {"causal": causal, "q_offset": offset if causal else 0}
        call = partial(flash_attention, **options)
        oracle = partial(reference.flash_attention, causal=causal, q_offset=options["q_offset"], scale=scale)
        on_npu, wide = [x.to("npu") for x in (q, *kv)], [x.double() for x in (q, *kv)]
        with torch.no_grad():
            compare("flash_attention", dtype, [call(*on_npu).cpu().double()], [oracle(*wide)[0]])
        if npu.refusal("flash_attention", on_npu[0].requires_grad_()) is None:
            compare("flash_attention", dtype, with_gradients(call, *on_npu), with_gradients(lambda *x, f=oracle: f(*x)[0], *wide))


CHECKS = {"rms_norm": check_rms_norm, "rope": check_rope, "swiglu": check_swiglu, "flash_attention": check_flash_attention}


def main() -> int:
    name = os.environ.get("PYALPACA_BACKEND", "npu")
    if name not in ("npu", "reference"):
        raise ValueError(
            f"PYALPACA_BACKEND is {name!r}, expected npu or reference: the others know nothing of torch's device npu"
        )
    with backend(name):
        for operator, check in CHECKS.items():
            dtypes = (torch.float16, torch.bfloat16, *((torch.float32,) if operator != "flash_attention" else ()))
            for dtype in dtypes:
                check(dtype)
            example = torch.empty(1, 1, 1, 64, dtype=torch.float16, device="npu")
            print(f"{operator:<18}{npu.description(operator, example) if name == 'npu' else 'plain torch'}")
    print(f"{', '.join(CHECKS)} with their gradients: as the oracle")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
