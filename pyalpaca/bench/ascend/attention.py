"""Attention's launches: forward in one, backward in three (row sums, gradients, rounding of dq), decoding in two."""

from __future__ import annotations

import ctypes

from pyalpaca.bench.ascend.library import tiling
from pyalpaca.bench.ascend.processors import Processor
from pyalpaca.bench.ascend.timeline import Argument, Filled, Launch, Reserved

Dims = tuple[int, int, int, int, int]  # batch, length, heads, kv heads, head_dim


def _strides(name: str, length: int, heads: int, head_dim: int) -> dict[str, Argument]:
    lies = (length * heads * head_dim, heads * head_dim, head_dim)
    return {f"{name}_{part}".lstrip("_"): n for part, n in zip(("batch_stride", "stride", "head_stride"), lies, strict=True)}


def _tail(dims: Dims, causal: bool) -> dict[str, Argument]:
    _, length, heads, kv_heads, head_dim = dims
    tail: dict[str, Argument] = {"lse_batch_stride": heads * length, "lse_head_stride": length, "q_offset": 0, "heads": heads}
    return tail | {"kv_heads": kv_heads, "head_dim": head_dim, "causal": int(causal)}


def flops(dims: Dims, causal: bool) -> float:
    """Of the forward pass: two products; half of them where half is hidden."""
    batch, length, heads, _, head_dim = dims
    return 4.0 * batch * heads * length * length * head_dim * (0.5 if causal else 1.0)


def forward(library: ctypes.CDLL, processor: Processor, dims: Dims, dtype: str, causal: bool) -> tuple[Launch, ...]:
    """Nothing if there is no tiling for these shapes; so of the others."""
    batch, length, heads, kv_heads, head_dim = dims
    cut = tiling(library, "flash_forward", batch, length, length, heads, kv_heads, head_dim, processor.cube_cores)
    cores, q_tile, kv_tile, stack, chunk, share, workspace, *_ = cut
    if cores == 0:
        return ()
    q, k = Reserved(batch * length * heads * head_dim * 2), Reserved(batch * length * kv_heads * head_dim * 2)
    arguments: dict[str, Argument] = {"q": q, "k": k, "v": k, "q_starts": None, "kv_starts": None, "out": q}
    arguments |= {"lse": Reserved(batch * heads * length * 4), "workspace": Reserved(workspace), "batch": batch}
    arguments |= {"q_len": length, "kv_len": length, **_strides("q", length, heads, head_dim)}
    arguments |= _strides("k", length, kv_heads, head_dim) | _strides("v", length, kv_heads, head_dim) | _tail(dims, causal)
    arguments |= {"q_tile": q_tile, "kv_tile": kv_tile, "stack": stack, "chunk": chunk, "share": share}
    arguments |= {"scale": head_dim**-0.5}
    return (Launch(f"flash_forward_{dtype}", "MIX", cores, arguments),)


def backward(library: ctypes.CDLL, processor: Processor, dims: Dims, dtype: str, causal: bool) -> tuple[Launch, ...]:
    batch, length, heads, kv_heads, head_dim = dims
    cut = tiling(library, "flash_backward", batch, length, length, heads, kv_heads, head_dim, processor.cube_cores)
    cores, side, q_block, kv_block, chunk, workspace, *_ = cut
    if cores == 0:
        return ()
    count = batch * length * heads * head_dim
    q, wide, k = Reserved(2 * count), Reserved(4 * count), Reserved(batch * length * kv_heads * head_dim * 2)
    statistics = Reserved(batch * heads * length * 4)
    first: dict[str, Argument] = {"out": q, "dout": q, "delta": statistics, "dq": wide, "batch": batch, "length": length}
    first |= {**_strides("", length, heads, head_dim), "heads": heads, "head_dim": head_dim}
    main: dict[str, Argument] = {"dout": q, "q": q, "k": k, "v": k, "lse": statistics, "delta": statistics, "q_starts": None}
    main |= {"kv_starts": None, "dq": wide, "dk": k, "dv": k, "workspace": Reserved(workspace), "batch": batch}
    main |= {"q_len": length, "kv_len": length}
    for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads), ("dout", heads)):
        main |= _strides(name, length, n, head_dim)
    main |= _tail(dims, causal) | {"side": side, "q_block": q_block, "kv_block": kv_block, "chunk": chunk}
    last: dict[str, Argument] = {"x": wide, "y": q, "count": count, "scale": head_dim**-0.5}
    return (
        Launch(f"flash_backward_{dtype}", "MIX", cores, main | {"scale": head_dim**-0.5}),
        Launch(f"flash_delta_{dtype}", "AIV", 2 * cores, first),
        Launch(f"flash_round_{dtype}", "AIV", 2 * cores, last),
    )


def decode(library: ctypes.CDLL, processor: Processor, dims: Dims, dtype: str) -> tuple[Launch, ...]:
    batch, length, heads, kv_heads, head_dim = dims
    cut = tiling(library, "flash_decode", batch, length, heads, kv_heads, head_dim, processor.cube_cores)
    cores, q_tile, kv_tile, stack, chunk, workspace, split, splits, *_ = cut
    if cores == 0:
        return ()
    rows = batch * heads
    q, cache = Reserved(rows * head_dim * 2), Reserved(batch * length * kv_heads * head_dim * 2)
    parts, lse = Reserved(splits * rows * head_dim * 4), Reserved(splits * rows * 4)
    arguments: dict[str, Argument] = {"q": q, "k": cache, "v": cache, "lengths": Filled((length,) * batch), "parts": parts}
    arguments |= {"part_lse": lse, "workspace": Reserved(workspace), "batch": batch, "kv_len": length}
    arguments |= {"q_batch_stride": heads * head_dim, "q_head_stride": head_dim}
    arguments |= _strides("k", length, kv_heads, head_dim) | _strides("v", length, kv_heads, head_dim)
    arguments |= {"split": split, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "q_tile": q_tile}
    arguments |= {"kv_tile": kv_tile, "stack": stack, "chunk": chunk, "scale": head_dim**-0.5}
    merged: dict[str, Argument] = {"parts": parts, "part_lse": lse, "out": q, "lse": Reserved(rows * 4), "rows": rows}
    merged |= {"splits": splits, "head_dim": head_dim}
    mergers = min(processor.vector_cores, -(-rows // 64))
    return (
        Launch(f"flash_decode_{dtype}", "MIX", cores, arguments),
        Launch(f"flash_merge_{dtype}", "AIV", mergers, merged),
    )
