"""The operators on torch's device npu, held to plain torch in float64: `python tests/ascend/on_the_device.py`, no argument.

Runs on a machine with an NPU as it does on the simulated one. The last line says what was compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
import torch_npu  # noqa: F401  (torch's device npu)
from ops_cases import TOLERANCE, assert_near, random

from pyalpaca.ops import backend, reference, rms_norm, rope


def with_gradients(function: object, *inputs: Tensor) -> list[Tensor]:
    """The result and, for a fixed gradient of it, those of the inputs, on the processor in float64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)  # type: ignore[operator]
    dy = random(*y.shape, seed=9).to(y.device, y.dtype)
    return [x.cpu().double() for x in (y.detach(), *torch.autograd.grad(y, leaves, dy))]


def compare(name: str, dtype: torch.dtype, found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (x, wanted) in enumerate(zip(found, expected, strict=True)):
        assert_near(x.to(dtype), wanted, TOLERANCE[dtype], f"{name} {dtype} {i}")


def main() -> int:
    compared = 0
    with backend("npu"):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for shape in ((2, 9, 256), (3, 520), (0, 64), (5, 4100)):
                x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
                found = with_gradients(lambda x, w: rms_norm(x, w, 1e-5), x.to("npu"), weight.to("npu"))
                expected = with_gradients(lambda x, w: reference.rms_norm(x, w, 1e-5), x.double(), weight.double())
                compare("rms_norm", dtype, found, expected)
                compared += 1
            for heads, head_dim, batched in ((5, 128, False), (4, 64, True)):
                fused = random(2, 7, 3 * heads, head_dim, dtype=dtype)  # the middle third is a view, as out of a projection
                angle = random(*((2, 7) if batched else (7,)), head_dim // 2, seed=2)
                part = slice(heads, 2 * heads)
                on_npu = [x.to("npu") for x in (fused, angle.cos(), angle.sin())]
                found = with_gradients(lambda x, on=on_npu, part=part: rope(x[:, :, part], on[1], on[2]), on_npu[0])
                c, s = angle.cos().double(), angle.sin().double()
                expected = with_gradients(lambda x, c=c, s=s, part=part: reference.rope(x[:, :, part], c, s), fused.double())
                compare("rope", dtype, found, expected)
                compared += 1
    print(f"{compared} shapes of rms_norm and rope with their gradients: as the oracle")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
