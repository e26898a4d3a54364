"""The operators of the model, each differentiable and served by one of several backends (C++, NPU, plain torch).

rms_norm(x, weight, eps), add_rms_norm(x, residual, weight, eps), rope(x_BSHd, cos, sin), rope_qk(q_BSHd, k_BSKd, cos, sin),
swiglu(gate, up), linear(x, weight), flash_attention(q_BSHd, k_BTKd, v_BTKd, ...), flash_attention_packed (of sequences side by
side), and without a gradient store_cache and cached_attention (decoding over a cache of keys and values), rope_qk_store,
lora_merge, adamw_ and grad_norm: fp32, bf16 and fp16 on CPU run in C++, every other dtype and device in plain torch.
PYALPACA_BACKEND=auto|cpp|npu|reference or `with backend("reference")` choose by name; `backend_report()` says which backend
serves which operator, and why.
"""

from pyalpaca.ops.ascend import npu_kernels
from pyalpaca.ops.backend import BACKENDS, OperatorReport, backend, backend_report
from pyalpaca.ops.cross_entropy import Shards, chunk_tokens, linear_cross_entropy
from pyalpaca.ops.memory import idle_memory, release_memory, reuse_memory
from pyalpaca.ops.operators import (
    adamw_,
    add_rms_norm,
    cached_attention,
    flash_attention,
    flash_attention_backward,
    flash_attention_lse,
    flash_attention_packed,
    grad_norm,
    linear,
    linear_dweight,
    linear_dweight_add_,
    linear_dx,
    linear_quantized,
    lora_merge,
    rms_norm,
    rope,
    rope_qk,
    rope_qk_store,
    store_cache,
    swiglu,
)
from pyalpaca.ops.quantize import GROUPS, dequantize, quantize

__all__ = [
    "BACKENDS",
    "GROUPS",
    "OperatorReport",
    "Shards",
    "adamw_",
    "add_rms_norm",
    "backend",
    "backend_report",
    "cached_attention",
    "chunk_tokens",
    "dequantize",
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_lse",
    "flash_attention_packed",
    "grad_norm",
    "idle_memory",
    "linear",
    "linear_cross_entropy",
    "linear_dweight",
    "linear_dweight_add_",
    "linear_dx",
    "linear_quantized",
    "lora_merge",
    "npu_kernels",
    "quantize",
    "release_memory",
    "reuse_memory",
    "rms_norm",
    "rope",
    "rope_qk",
    "rope_qk_store",
    "store_cache",
    "swiglu",
]
