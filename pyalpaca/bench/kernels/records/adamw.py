"""The optimizer's step over a list of tensors, in place: a call goes on where the last one stopped; and the norm before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pyalpaca.bench.kernels.operator import Case, Function, Operator, Peer, Work, plain
from pyalpaca.ops import adamw_, grad_norm, reference

SHAPES = {"llama7b/attention": (4, 4096, 4096), "width768/60m": (84, 768, 1024), "small/1m": (16, 256, 256)}
LR, BETA1, BETA2, EPS, DECAY, STEP = 1e-4, 0.9, 0.95, 1e-8, 0.1, 10


def _make(case: Case) -> list[Any]:
    """weights, grads, both moments, and for half types the copies that are written along: lists of fp32 but for the last."""
    count, *shape = case.sizes

    def tensors(scale: float) -> list[Tensor]:
        return [case.random(*shape, dtype=torch.float32, grad=False).mul_(scale) for _ in range(count)]

    weights, grads, means = tensors(0.02), tensors(1e-3), tensors(1e-3)
    squares = [x.square_() for x in tensors(1e-3)]
    return [weights, grads, means, squares, [] if case.dtype == "float32" else [x.to(case.torch_dtype) for x in weights]]


def _work(case: Case, direction: str) -> Work:
    values = float(case.sizes[0] * case.sizes[1] * case.sizes[2])
    return Work(14 * values, 16 * values, 12 * values + (0.0 if case.dtype == "float32" else case.item * values))


def _ours(weights: Any, grads: Any, means: Any, squares: Any, copies: Any) -> None:
    rest: dict[str, Any] = {"step": STEP, "lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS}
    adamw_(weights, grads, means, squares, weight_decays=[DECAY] * len(weights), copies=copies, **rest)


def _plain(weights: Any, grads: Any, means: Any, squares: Any, copies: Any) -> None:
    decays = [DECAY] * len(weights)
    reference.adamw_(weights, grads, means, squares, copies, decays, STEP, LR, BETA1, BETA2, EPS, 1.0)


def _torch(fused: bool) -> Function:
    def call(weights: Any, grads: Any, means: Any, squares: Any, copies: Any) -> None:
        steps = [torch.tensor(float(STEP - 1)) for _ in weights]
        rest: dict[str, Any] = {"beta1": BETA1, "beta2": BETA2, "lr": LR, "weight_decay": DECAY, "eps": EPS}
        with torch.no_grad():
            adamw(weights, grads, means, squares, [], steps, not fused, fused=fused, amsgrad=False, maximize=False, **rest)
            for copy, weight in zip(copies, weights, strict=bool(copies)):
                copy.copy_(weight)

    return call


ADAMW = Operator(
    "adamw_",
    axes="tensors x rows x columns",
    formula="weight, gradient and both moments are read, the first and the moments written, once each, all fp32, and for half "
    "types a copy of the weight; 14 flops a value",
    shapes=SHAPES,
    make=_make,
    ours=_ours,
    work=_work,
    peers=(plain(_plain), Peer("fused", lambda: _torch(fused=True)), Peer("foreach", lambda: _torch(fused=False))),
    directions=("fwd",),
    devices=("cpu",),
)


def _make_norm(case: Case) -> list[Any]:
    count, *shape = case.sizes
    return [case.random(*shape, grad=False) for _ in range(count)]


def _work_norm(case: Case, direction: str) -> Work:
    count, rows, columns = case.sizes
    values = count * rows * columns
    return Work(2 * values, values * case.item, 8)


def _functional_norm(*grads: Tensor) -> Tensor:
    return torch.nn.utils.get_total_norm(grads)


GRAD_NORM = Operator(
    "grad_norm",
    axes="tensors x rows x columns",
    formula="every gradient is read; 2 flops a value",
    shapes=SHAPES,
    make=_make_norm,
    ours=lambda *grads: grad_norm(grads),
    work=_work_norm,
    peers=(plain(lambda *grads: reference.grad_norm(grads)), Peer("functional", lambda: _functional_norm)),
    directions=("fwd",),
    devices=("cpu",),
)
