"""The operators of the model, each differentiable and served by one of several backends (C++, NPU, plain torch).

rms_norm(x, weight, eps), linear(x, weight), rope(x_BSHd, cos, sin), flash_attention(q_BSHd, k_BTKd, v_BTKd, ...), and
lora_merge(weight, factors), which has no gradient: fp32, bf16 and fp16 on CPU run in C++, every other dtype and device in
plain torch.
PYALPACA_BACKEND=auto|cpp|npu|reference or `with backend("reference")` choose by name; `backend_report()` says which backend
serves which operator, and why.
"""

from pyalpaca.ops.ascend import npu_kernels
from pyalpaca.ops.backend import BACKENDS, OperatorReport, backend, backend_report
from pyalpaca.ops.operators import (
    flash_attention,
    flash_attention_backward,
    flash_attention_lse,
    linear,
    linear_dweight,
    linear_dx,
    lora_merge,
    rms_norm,
    rope,
)

__all__ = [
    "BACKENDS",
    "OperatorReport",
    "backend",
    "backend_report",
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_lse",
    "linear",
    "linear_dweight",
    "linear_dx",
    "lora_merge",
    "npu_kernels",
    "rms_norm",
    "rope",
]
