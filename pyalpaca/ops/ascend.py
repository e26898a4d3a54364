"""Our own kernels for Ascend NPUs: loading pyalpaca._C_npu, and which operators on which tensors it serves.

Importing the module gives torch.ops.pyalpaca.* kernels for tensors on an NPU; their schemas and gradients are pyalpaca._C's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from pathlib import Path

import torch
from torch import Tensor

from pyalpaca.ops import extension

_BUILD_INFO = Path(__file__).parents[1] / "_C_npu.build.json"
_REBUILD = "install pyalpaca again where CANN's set_env.sh has been sourced (docs/ascend.md)"


def build_info() -> dict[str, str] | None:
    """What the kernels were built with ({"torch", "torch_npu", "soc", "toolkit", "compiler"}), or None if they were not."""
    if not _BUILD_INFO.exists():
        return None
    info: dict[str, str] = json.loads(_BUILD_INFO.read_text(encoding="utf-8"))
    return info


def npu_kernels() -> tuple[dict[str, str] | None, str | None]:
    """What our kernels for NPUs were built with, None if they were not, and why they can't be used here, None if they can."""
    return build_info(), problem()


@functools.cache
def problem() -> str | None:
    """Load the kernels; None if that went well, else why they can't be used."""
    info = build_info()
    if info is None or importlib.util.find_spec("pyalpaca._C_npu") is None:
        return f"our kernels were not built; {_REBUILD}"
    if extension.minor(info["torch"]) != extension.minor(torch.__version__):
        return f"our kernels were built with torch {info['torch']}, but torch {torch.__version__} is installed; {_REBUILD}"
    trouble = extension.problem()  # has the schemas and the gradients
    if trouble is not None:
        return trouble
    try:
        importlib.import_module("torch_npu")  # the libraries that the module is linked with
        importlib.import_module("pyalpaca._C_npu")
    except (ImportError, OSError, RuntimeError) as error:
        return f"our kernels do not load ({error}); {_REBUILD}"
    return None


def refusal(operator: str, x: Tensor) -> str | None:
    """Why none of our kernels serves `operator` on tensors like `x`, or None if one does."""
    trouble = problem()
    if trouble is not None:
        return trouble
    if not _has_kernel(operator):
        return "there is no kernel of ours for it"
    attention = operator in ("flash_attention", "flash_attention_packed")
    if attention and x.requires_grad and torch.is_grad_enabled() and not _has_kernel(f"{operator}_backward"):
        return "there is no kernel of ours for its gradient"
    width = x.shape[-1]
    if operator in ("rms_norm", "add_rms_norm") and not 1 <= width <= 8192:
        return f"rows are {width} long, our kernel takes up to 8192"
    if (attention or operator in ("rope", "rope_qk", "rope_qk_store")) and (width % 16 != 0 or not 16 <= width <= 128):
        return f"head_dim is {width}, our kernel takes multiples of 16 up to 128"
    dtypes = (torch.float16, torch.bfloat16) if attention else (torch.float16, torch.bfloat16, torch.float32)
    if x.dtype not in dtypes:
        return f"the tensors are {x.dtype}, our kernel takes {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
    return None


def _has_kernel(operator: str) -> bool:
    name = f"pyalpaca::{operator}"
    return hasattr(torch.ops.pyalpaca, operator) and torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1")
