"""Attention of csrc/ascend as functions on tensors, cut as its tiling says (or as `cut` does) and run on the emulation."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from emulation import MIX_AIC_1_2, Output, launch
from npu_kernels import NAMES
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """Cores; rows of a tile; keys of a part and of a stack; scores that are in unified memory at a time."""

    cores: int = 2
    q_tile: int = 32
    kv_tile: int = 32
    stack: int = 64
    chunk: int = 1024

    def workspace(self, head_dim: int) -> int:
        return self.cores * self.q_tile * (3 * self.stack * 4 + 2 * self.stack * 2 + 2 * head_dim * 4)


SMALL = Cut()


def forward_tiling(library: ctypes.CDLL, *shape: int) -> tuple[Cut, int, tuple[int, ...]]:
    """What the tiling says of (batch, q_len, kv_len, heads, kv_heads, head_dim, cores): the cut, bytes of workspace, memories."""
    out = (ctypes.c_int64 * 11)()
    library.tiling_flash_forward(*map(ctypes.c_int64, shape), out)
    return Cut(*out[:5]), out[5], tuple(out[6:])


def flash_forward(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    q_offset: int = 0,
    scale: float | None = None,
    starts: tuple[Sequence[int], Sequence[int]] | None = None,
    cut: Cut = SMALL,
    seed: int = 0,
    prefix: str = "",
) -> tuple[Tensor, Tensor]:
    """out and lse of q (B, S, H, d), k and v (B, T, K, d); of packed sequences (N, H, d), (M, K, d) if `starts` are given."""
    packed = starts is not None
    q_starts, kv_starts = (torch.tensor(s) for s in starts) if starts else (None, None)
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    if packed:
        batch, q_len, kv_len = len(q_starts) - 1, int(q_starts.diff().max()), int(kv_starts.diff().max())
        lse_shape, lse_strides = (heads, len(q)), (0, len(q))
    else:
        batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
        lse_shape, lse_strides = (batch, heads, q_len), (heads * q_len, q_len)
    lies = [(0, *x.stride()[:2]) if packed else tuple(x.stride()[:3]) for x in (q, k, v)]
    names = ["batch_stride", "stride", "head_stride"]
    tensors = {"q": q, "k": k, "v": v}
    out = launch(
        library,
        f"{prefix}flash_forward_{NAMES[q.dtype]}",
        cut.cores,
        {
            **{name: whole(x) for name, x in tensors.items()},
            "q_starts": q_starts,
            "kv_starts": kv_starts,
            "out": Output(tuple(q.shape), q.dtype),
            "lse": Output(lse_shape, torch.float32),
            "workspace": Output((cut.workspace(head_dim),), torch.int8, part=True),
            "batch": batch,
            "q_len": q_len,
            "kv_len": kv_len,
            **{f"{name}_{part}": n for name, lie in zip("qkv", lies, strict=True) for part, n in zip(names, lie, strict=True)},
            "lse_batch_stride": lse_strides[0],
            "lse_head_stride": lse_strides[1],
            "q_offset": q_offset,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "causal": int(causal),
            "q_tile": cut.q_tile,
            "kv_tile": cut.kv_tile,
            "stack": cut.stack,
            "chunk": cut.chunk,
            "scale": float(head_dim**-0.5 if scale is None else scale),
        },
        seed,
        MIX_AIC_1_2,
    )
    return out["out"], out["lse"]


def whole(x: Tensor) -> Tensor:
    """The memory that a view looks at, from its first element on."""
    size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return torch.as_strided(x, (size,), (1,))


def with_cores(cut: Cut, cores: int) -> Cut:
    return replace(cut, cores=cores)
