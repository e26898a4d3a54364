"""Which backend serves an operator: asked for by name, or chosen from what is installed and what the tensors are."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyalpaca.ops import cpp, extension, npu, reference

BACKENDS = ("auto", "cpp", "npu", "reference")
OPERATORS = (
    "rms_norm",
    "add_rms_norm",
    "rope",
    "rope_qk",
    "rope_qk_store",
    "swiglu",
    "flash_attention",
    "flash_attention_packed",
    "cached_attention",
    "store_cache",
    "lora_merge",
    "linear",
    "linear_quantized",
    "adamw_",
    "grad_norm",
)


class Backend(Protocol):
    """What a backend module offers."""

    def refusal(self, operator: str, x: Tensor) -> str | None: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor: ...

    def rope(self, x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...

    def rope_qk(
        self, q_BSHd: Tensor, k_BSKd: Tensor, cos: Tensor, sin: Tensor, positions_BS: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...

    def rope_qk_store(
        self,
        q_BSHd: Tensor,
        k_BSKd: Tensor,
        v_BSKd: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions_BS: Tensor | None,
        slots_BS: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> tuple[Tensor, Tensor]: ...

    def flash_attention(
        self, q_BSHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, causal: bool, q_offset: int, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def flash_attention_packed(
        self,
        q_NHd: Tensor,
        k_MKd: Tensor,
        v_MKd: Tensor,
        q_starts: Sequence[int],
        kv_starts: Sequence[int],
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]: ...

    def flash_attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def cached_attention(
        self, q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, length: int, scale: float
    ) -> Tensor: ...

    def store_cache(self, x: Tensor, cache: Tensor, scales: Tensor | None, start: int) -> None: ...

    def lora_merge(self, weight: Tensor, factors: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor: ...

    def linear(self, x: Tensor, weight: Tensor) -> Tensor: ...

    def linear_dx(self, dy: Tensor, weight: Tensor) -> Tensor: ...

    def linear_dweight(self, dy: Tensor, x: Tensor) -> Tensor: ...

    def adamw_(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        copies: Sequence[Tensor],
        weight_decays: Sequence[float],
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        grad_scale: float,
    ) -> None: ...

    def grad_norm(self, grads: Sequence[Tensor]) -> Tensor: ...
    def linear_dweight_add_(self, total: Tensor, dy: Tensor, x: Tensor) -> None: ...

    def linear_dweight_split(self, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def linear_dweight_add_split_(self, total: Tensor, lower: Tensor, dy: Tensor, x: Tensor, last: bool) -> None: ...

    def logit_sums(self, logits_TV: Tensor, labels_T: Tensor, start: int) -> Tensor: ...

    def logit_loss_(
        self, logits_TV: Tensor, labels_T: Tensor, start: int, sums_3T: Tensor, scale: float | Tensor, gradient: bool
    ) -> Tensor: ...

    def linear_quantized(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor: ...


_MODULES: dict[str, Backend] = {"cpp": cpp, "npu": npu, "reference": reference}
_asked: ContextVar[str | None] = ContextVar("pyalpaca_backend", default=None)
_warned: set[str] = set()


@dataclass(frozen=True)
class OperatorReport:
    """Who serves an operator on this machine's best device (fp32; on an NPU fp16, in which it computes), and why."""

    operator: str
    backend: str
    reason: str


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block, operators use the backend `name` (one of BACKENDS), whatever PYALPACA_BACKEND says."""
    _check(name, "backend()")
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def choose(operator: str, x: Tensor) -> Backend:
    """The module that serves `operator` on tensors like `x`. ValueError if the backend asked for by name can't."""
    name = asked()
    if name != "auto":
        refusal = _MODULES[name].refusal(operator, x)
        if refusal is not None:
            raise ValueError(f"the backend {name!r}, asked for by name, can't serve {operator}: {refusal}")
        return _MODULES[name]
    preferred = _preferred(x.device, x.dtype)
    refusal = _MODULES[preferred].refusal(operator, x)
    if refusal is None:
        return _MODULES[preferred]
    message = f"{operator} falls back to plain torch: {refusal}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)
    return reference


def asked() -> str:
    """The name asked for: by `with backend(...)`, else by PYALPACA_BACKEND, else auto."""
    inner = _asked.get()
    if inner is not None:
        return inner
    name = os.environ.get("PYALPACA_BACKEND") or "auto"
    _check(name, "PYALPACA_BACKEND")
    return name


def backend_report() -> list[OperatorReport]:
    """For each operator the backend that would serve it now, and the reason; nothing is warned about or raised."""
    device = torch.device("npu") if npu.problem() is None else torch.device("cpu")
    name = asked()
    candidate = _preferred(device, torch.float32) if name == "auto" else name
    x = torch.empty(1, 1, 1, 128, device=device, dtype=torch.float16 if device.type == "npu" else torch.float32)
    rows = []
    for operator in OPERATORS:
        refusal = _MODULES[candidate].refusal(operator, x)
        if refusal is None:
            why = "the automatic choice" if name == "auto" else "asked for by name"
            rows.append(OperatorReport(operator, candidate, f"{why}, {_description(candidate, operator, x)}"))
        elif name == "auto":
            rows.append(OperatorReport(operator, "reference", f"fallback, because {refusal}"))
        else:
            rows.append(OperatorReport(operator, "none", f"{candidate} was asked for by name, but {refusal}"))
    return rows


def _preferred(device: torch.device, dtype: torch.dtype) -> str:
    """The backend made for such tensors. fp64 and devices without kernels of ours belong to the reference, no fallback."""
    if device.type == "npu":
        return "npu"
    return "cpp" if device.type in ("cpu", "meta") and dtype != torch.float64 else "reference"


def _description(name: str, operator: str, x: Tensor) -> str:
    if name == "cpp":
        info = extension.module().info()
        return f"C++ kernels for {info['capability']}, built with torch {info['torch']}"
    return npu.description(operator, x) if name == "npu" else "plain torch"


def _check(name: str, where: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{where}: found {name!r}, expected one of {', '.join(BACKENDS)}")
