"""Attention of csrc/ascend as functions on tensors, cut as its tiling says (or as `cut` does) and run on the emulation."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from emulation import MIX_AIC_1_2, Output, launch
from npu_kernels import NAMES
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """Cores; rows of a tile; keys of a part and of a stack; scores in unified memory at a time; tiles that share keys."""

    cores: int = 2
    q_tile: int = 32
    kv_tile: int = 32
    stack: int = 64
    chunk: int = 1024
    share: int = 1

    def workspace(self, head_dim: int) -> int:
        return self.cores * self.q_tile * 3 * (self.stack * 4 + self.stack * 2 + head_dim * 4)


SMALL = Cut()
PAIRS = Cut(share=2)


def forward_tiling(library: ctypes.CDLL, *shape: int) -> tuple[Cut, int, tuple[int, ...]]:
    """What the tiling says of (batch, q_len, kv_len, heads, kv_heads, head_dim, cores): the cut, bytes of workspace, memories."""
    out = (ctypes.c_int64 * 12)()
    library.tiling_flash_forward(*map(ctypes.c_int64, shape), out)
    return Cut(*out[:6]), out[6], tuple(out[7:])


TAIL_OF_DIMS = ("lse_batch_stride", "lse_head_stride", "q_offset", "heads", "kv_heads", "head_dim", "causal")


def lies(x: Tensor) -> tuple[int, ...]:
    """How far sequences, tokens and heads are apart; packed sequences (N, H, d) are not."""
    return (0, *x.stride()[:2]) if x.dim() == 3 else tuple(x.stride()[:3])


def attention_arguments(
    q: Tensor, k: Tensor, v: Tensor, starts: tuple[Sequence[int], Sequence[int]] | None, causal: bool, q_offset: int
) -> dict[str, Any]:
    """The arguments that kernels of attention share: tensors, starts, and under "dims" sizes and strides in their order."""
    q_starts, kv_starts = (torch.tensor(s) for s in starts) if starts else (None, None)
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    if q_starts is not None and kv_starts is not None:
        batch, q_len, kv_len = len(q_starts) - 1, int(q_starts.diff().max()), int(kv_starts.diff().max())
        lse_strides = (0, len(q))
    else:
        batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
        lse_strides = (heads * q_len, q_len)
    parts = ("batch_stride", "stride", "head_stride")
    strides = {
        f"{name}_{part}": n for name, x in zip("qkv", (q, k, v), strict=True) for part, n in zip(parts, lies(x), strict=True)
    }
    dims = {"batch": batch, "q_len": q_len, "kv_len": kv_len, **strides}
    dims |= dict(zip(TAIL_OF_DIMS, (*lse_strides, q_offset, heads, kv_heads, head_dim, int(causal)), strict=True))
    return {"q": whole(q), "k": whole(k), "v": whole(v), "q_starts": q_starts, "kv_starts": kv_starts, "dims": dims}


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
    given = attention_arguments(q, k, v, starts, causal, q_offset)
    dims, heads = given.pop("dims"), q.shape[-2]
    lse_shape = (heads, len(q)) if starts else (q.shape[0], heads, q.shape[1])
    out = launch(
        library,
        f"{prefix}flash_forward_{NAMES[q.dtype]}",
        cut.cores,
        {
            **given,
            "out": Output(tuple(q.shape), q.dtype),
            "lse": Output(lse_shape, torch.float32),
            "workspace": Output((cut.workspace(q.shape[-1]),), torch.int8, part=True),
            **dims,
            "q_tile": cut.q_tile,
            "kv_tile": cut.kv_tile,
            "stack": cut.stack,
            "chunk": cut.chunk,
            "share": cut.share,
            "scale": float(q.shape[-1] ** -0.5 if scale is None else scale),
        },
        seed,
        MIX_AIC_1_2,
    )
    return out["out"], out["lse"]


def whole(x: Tensor) -> Tensor:
    """The memory that a view looks at, from its first element on."""
    size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return torch.as_strided(x, (size,), (1,))


@dataclass(frozen=True)
class GradientCut:
    """Cores; side of a product; rows and keys of a block; scores that are in unified memory at a time."""

    cores: int = 2
    side: int = 32
    q_block: int = 64
    kv_block: int = 64
    chunk: int = 1024

    def workspace(self, head_dim: int) -> int:
        return self.cores * (3 * 2 * self.q_block * self.kv_block * (4 + 2) + 2 * 2 * self.kv_block * head_dim * 4)


def backward_tiling(library: ctypes.CDLL, *shape: int) -> tuple[GradientCut, int, tuple[int, ...]]:
    """What the tiling says of (batch, q_len, kv_len, heads, kv_heads, head_dim, cores): the cut, bytes of workspace, memories."""
    out = (ctypes.c_int64 * 11)()
    library.tiling_flash_backward(*map(ctypes.c_int64, shape), out)
    return GradientCut(*out[:5]), out[5], tuple(out[6:])


def flash_backward(
    library: ctypes.CDLL,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    q_offset: int = 0,
    scale: float | None = None,
    starts: tuple[Sequence[int], Sequence[int]] | None = None,
    cut: GradientCut = GradientCut(),
    seed: int = 0,
    prefix: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; tensors as for `flash_forward`."""
    kind, factor = NAMES[q.dtype], float(q.shape[-1] ** -0.5 if scale is None else scale)
    (heads, head_dim), packed = q.shape[-2:], starts is not None
    batch, length = (1, len(q)) if packed else q.shape[:2]
    stride = dict(zip(("batch_stride", "stride", "head_stride"), lies(dout), strict=True))
    sums = {"delta": Output(tuple(lse.shape), torch.float32), "dq": Output(tuple(q.shape), torch.float32)}
    shape = {"heads": heads, "head_dim": head_dim}
    arguments = {"out": out, "dout": whole(dout), **sums, "batch": batch, "length": length, **stride, **shape}
    first = launch(library, f"{prefix}flash_delta_{kind}", 2 * cut.cores, arguments, seed)
    given = attention_arguments(q, k, v, starts, causal, q_offset)
    dims = given.pop("dims")
    gradients = launch(
        library,
        f"{prefix}flash_backward_{kind}",
        cut.cores,
        {
            "dout": whole(dout),
            **{name: given[name] for name in "qkv"},
            "lse": lse,
            "delta": first["delta"],
            "q_starts": given["q_starts"],
            "kv_starts": given["kv_starts"],
            "dq": first["dq"],
            "dk": Output(tuple(k.shape), k.dtype),
            "dv": Output(tuple(v.shape), v.dtype),
            "workspace": Output((cut.workspace(head_dim),), torch.int8, part=True),
            **{name: dims[name] for name in ("batch", "q_len", "kv_len")},
            **{f"{name}_{part}": dims[f"{name}_{part}"] for name in "qkv" for part in stride},
            **{f"dout_{part}": value for part, value in stride.items()},
            **{name: dims[name] for name in TAIL_OF_DIMS},
            "side": cut.side,
            "q_block": cut.q_block,
            "kv_block": cut.kv_block,
            "chunk": cut.chunk,
            "scale": factor,
        },
        seed,
        MIX_AIC_1_2,
        in_place=("dq",),
    )
    dq = Output(tuple(q.shape), q.dtype)
    rounded = {"x": gradients["dq"], "y": dq, "count": q.numel(), "scale": factor}
    last = launch(library, f"{prefix}flash_round_{kind}", 2 * cut.cores, rounded, seed)
    return last["y"], gradients["dk"], gradients["dv"]


def decode_tiling(library: ctypes.CDLL, *shape: int) -> tuple[Cut, int, tuple[int, int], tuple[int, ...]]:
    """What the tiling says of (batch, kv_len, heads, kv_heads, head_dim, cores): cut, workspace, (keys, splits), memories."""
    out = (ctypes.c_int64 * 14)()
    library.tiling_flash_decode(*map(ctypes.c_int64, shape), out)
    return Cut(*out[:5]), out[5], (out[6], out[7]), tuple(out[8:])


def flash_decode(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    scale: float | None = None,
    cut: Cut = Cut(q_tile=16),
    split: int = 128,
    seed: int = 0,
    prefix: str = "",
) -> tuple[Tensor, Tensor]:
    """out and lse (B, H, 1) of q (B, 1, H, d) over caches (B, T, K, d), of which sequence b has `lengths[b]` keys."""
    (batch, _, heads, head_dim), (kv_len, kv_heads), kind = q.shape, k.shape[1:3], NAMES[q.dtype]
    splits = max(1, -(-kv_len // split))
    parts = launch(
        library,
        f"{prefix}flash_decode_{kind}",
        cut.cores,
        {
            "q": whole(q),
            "k": whole(k),
            "v": whole(v),
            "lengths": lengths,
            "parts": Output((splits, batch, heads, head_dim), torch.float32),
            "part_lse": Output((splits, batch, heads), torch.float32),
            "workspace": Output((cut.workspace(head_dim),), torch.int8, part=True),
            "batch": batch,
            "kv_len": kv_len,
            "q_batch_stride": q.stride(0),
            "q_head_stride": q.stride(2),
            **{f"k_{i}": n for i, n in enumerate(lies(k))},
            **{f"v_{i}": n for i, n in enumerate(lies(v))},
            "split": split,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "q_tile": cut.q_tile,
            "kv_tile": cut.kv_tile,
            "stack": cut.stack,
            "chunk": cut.chunk,
            "scale": float(head_dim**-0.5 if scale is None else scale),
        },
        seed,
        MIX_AIC_1_2,
    )
    merged = launch(
        library,
        f"{prefix}flash_merge_{kind}",
        cut.cores,
        {
            "parts": parts["parts"],
            "part_lse": parts["part_lse"],
            "out": Output(tuple(q.shape), q.dtype),
            "lse": Output((batch, heads, 1), torch.float32),
            "rows": batch * heads,
            "splits": splits,
            "head_dim": head_dim,
        },
        seed,
    )
    return merged["out"], merged["lse"]
