"""The kernels as launches for a shape, with the least they must move or compute: what the share of the peak is a share of."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from pyalpaca.bench.ascend import attention
from pyalpaca.bench.ascend.library import tiling
from pyalpaca.bench.ascend.processors import Processor
from pyalpaca.bench.ascend.timeline import Argument, Launch, Reserved

SIZES = {"half": 2, "bfloat16": 2, "float": 4}
Shape = tuple[int, ...]
Arguments = dict[str, Argument]


@dataclass(frozen=True)
class Work:
    """The launches of one call, and what bounds it: `hbm` with bytes, or `cube` with flops."""

    launches: tuple[Launch, ...]
    limit: str
    amount: float


@dataclass(frozen=True)
class Case:
    """A kernel: what its shapes mean, those it is shown with, types, and how it is launched."""

    text: str
    dims: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    make: Callable[[ctypes.CDLL, Processor, Shape, str], Work]


def _served(cores: int, kernel: str, shape: Shape) -> None:
    if cores == 0:
        raise ValueError(f"{kernel} has no tiling for {'x'.join(map(str, shape))}; choose another shape, see --help")


def _rms_norm(residual: bool) -> Callable[[ctypes.CDLL, Processor, Shape, str], Work]:
    def make(library: ctypes.CDLL, processor: Processor, shape: Shape, dtype: str) -> Work:
        (rows, width), size = shape, SIZES[dtype]
        cores, tile_rows, *_ = tiling(library, "rms_norm", rows, width, size, int(residual), processor.vector_cores)
        _served(cores, "rms_norm", shape)
        tensor = Reserved(rows * width * size)
        arguments: Arguments = {"x": tensor, "residual": tensor if residual else None, "gamma": Reserved(width * 4), "y": tensor}
        arguments |= {"sum": tensor if residual else None, "rstd": Reserved(rows * 4), "rows": rows, "stride": width}
        rest: Arguments = {"width": width, "tile_rows": tile_rows, "eps": 1e-5, "inverse_width": 1.0 / width}
        moved = (4 if residual else 2) * tensor.bytes + 4 * (rows + width)
        return Work((Launch(f"rms_norm_{dtype}", "AIV", cores, {**arguments, **rest}),), "hbm", moved)

    return make


def _rms_norm_backward(library: ctypes.CDLL, processor: Processor, shape: Shape, dtype: str) -> Work:
    (rows, width), size = shape, SIZES[dtype]
    available = processor.vector_cores
    cores, tile_rows, buffers, *_ = tiling(library, "rms_norm_backward", rows, width, size, 0, available)
    _served(cores, "rms_norm_backward", shape)
    tensor, parts = Reserved(rows * width * size), Reserved(cores * width * 4)
    arguments: Arguments = {"dy": tensor, "x": tensor, "gamma": Reserved(width * 4), "rstd": Reserved(rows * 4), "dsum": None}
    rest: Arguments = {"dx": tensor, "parts": parts, "rows": rows, "dy_stride": width, "x_stride": width, "width": width}
    rest |= {"tile_rows": tile_rows, "buffers": buffers, "inverse_width": 1.0 / width}
    first = Launch(f"rms_norm_backward_{dtype}", "AIV", cores, {**arguments, **rest})
    adders, columns, *_ = tiling(library, "dgamma", cores, width, 0, 0, available)
    sums: Arguments = {"parts": parts, "dgamma": Reserved(width * size), "num_parts": cores, "width": width, "columns": columns}
    moved = 3 * tensor.bytes + 4 * rows + (4 + size) * width
    return Work((first, Launch(f"rms_norm_dgamma_{dtype}", "AIV", adders, sums)), "hbm", moved)


def _rope(library: ctypes.CDLL, processor: Processor, shape: Shape, dtype: str) -> Work:
    (tokens, heads, kv_heads, head_dim), size = shape, SIZES[dtype]
    cut = tiling(library, "rope", tokens, heads, kv_heads, head_dim, size, 0, processor.vector_cores)
    _served(cut[0], "rope", shape)
    q, k, angles = (
        Reserved(tokens * heads * head_dim * size),
        Reserved(tokens * kv_heads * head_dim * size),
        Reserved(tokens * head_dim * 2),
    )
    arguments: Arguments = {"q": q, "k": k, "v": None, "cos": angles, "sin": angles, "positions": None, "slots": None, "q_out": q}
    widths: Arguments = {"q_stride": heads * head_dim, "k_stride": kv_heads * head_dim, "v_stride": 0}
    widths |= {"q_out_stride": heads * head_dim, "k_out_stride": kv_heads * head_dim, "cache_stride": 0, "period": tokens}
    rest: Arguments = {
        "k_out": k,
        "k_cache": None,
        "v_cache": None,
        "tokens": tokens,
        **widths,
        "q_heads": heads,
        "k_heads": kv_heads,
    }
    rest |= {"head_dim": head_dim, "tile_tokens": cut[1], "tile_heads": cut[2], "inverse": 0}
    moved = 2 * (q.bytes + k.bytes) + 2 * angles.bytes
    return Work((Launch(f"rope_{dtype}", "AIV", cut[0], {**arguments, **rest}),), "hbm", moved)


def _swiglu(backward: bool) -> Callable[[ctypes.CDLL, Processor, Shape, str], Work]:
    def make(library: ctypes.CDLL, processor: Processor, shape: Shape, dtype: str) -> Work:
        (rows, width), size = shape, SIZES[dtype]
        cores, tile_rows, tile_columns, *_ = tiling(library, "swiglu", rows, width, size, int(backward), processor.vector_cores)
        _served(cores, "swiglu", shape)
        tensor = Reserved(rows * width * size)
        names = ("dy", "gate", "up", "dgate", "dup") if backward else ("gate", "up", "y")
        strides = ("dy_stride", "gate_stride", "up_stride") if backward else ("gate_stride", "up_stride")
        arguments: Arguments = {**dict.fromkeys(names, tensor), "rows": rows, **dict.fromkeys(strides, width)}
        arguments |= {"width": width, "tile_rows": tile_rows, "tile_columns": tile_columns}
        kernel = f"swiglu_backward_{dtype}" if backward else f"swiglu_{dtype}"
        return Work((Launch(kernel, "AIV", cores, arguments),), "hbm", len(names) * tensor.bytes)

    return make


def _attention(kind: str, causal: bool = True) -> Callable[[ctypes.CDLL, Processor, Shape, str], Work]:
    def make(library: ctypes.CDLL, processor: Processor, shape: Shape, dtype: str) -> Work:
        batch, length, heads, kv_heads, head_dim = dims = (shape[0], shape[1], shape[2], shape[3], shape[4])
        if kind == "decode":
            launches = attention.decode(library, processor, dims, dtype)
            amount = 2.0 * batch * (2 * length * kv_heads + 2 * heads) * head_dim
        else:
            make_launches = attention.backward if kind == "backward" else attention.forward
            launches = make_launches(library, processor, dims, dtype, causal)
            amount = attention.flops(dims, causal) * (2.5 if kind == "backward" else 1.0)
        _served(len(launches), f"flash_{kind}", shape)
        return Work(launches, "hbm" if kind == "decode" else "cube", amount)

    return make


_ALL, _HALVES = ("bfloat16", "half", "float"), ("bfloat16", "half")
CASES: dict[str, Case] = {
    "rms_norm": Case("y and rstd", "rows x width", ((8192, 4096), (8192, 5120)), _ALL, _rms_norm(False)),
    "add_rms_norm": Case("of x + residual, which is kept", "rows x width", ((8192, 4096),), _ALL, _rms_norm(True)),
    "rms_norm_backward": Case("dx, dgamma in two launches", "rows x width", ((8192, 4096),), _ALL, _rms_norm_backward),
    "rope": Case(
        "q and k in one launch", "tokens x heads x kv heads x d", ((8192, 32, 32, 128), (8192, 32, 8, 128)), _ALL, _rope
    ),
    "swiglu": Case("silu(gate) up", "rows x width", ((8192, 11008),), _ALL, _swiglu(False)),
    "swiglu_backward": Case("dgate and dup", "rows x width", ((8192, 11008),), _ALL, _swiglu(True)),
    "flash_forward": Case(
        "causal attention", "batch x length x heads x kv heads x d", ((1, 4096, 32, 32, 128),), _HALVES, _attention("forward")
    ),
    "flash_forward_full": Case(
        "attention without a mask",
        "batch x length x heads x kv heads x d",
        ((1, 8192, 8, 8, 128),),
        _HALVES,
        _attention("forward", causal=False),
    ),
    "flash_backward": Case(
        "causal attention's gradients, in three launches",
        "batch x length x heads x kv heads x d",
        ((1, 4096, 24, 24, 128),),
        _HALVES,
        _attention("backward"),
    ),
    "flash_decode": Case(
        "one token over a cache, in two launches",
        "batch x length x heads x kv heads x d",
        ((8, 8192, 32, 8, 128), (8, 4096, 32, 32, 128)),
        _HALVES,
        _attention("decode"),
    ),
}
# Shares of 354 TFLOPS that others measured on a 910B2, head_dim 128, no mask: length -> vendor's kernel, best public one.
PUBLISHED = {"flash_forward_full": {8192: (0.27, 0.33), 16384: (0.35, 0.43), 32768: (0.43, 0.48)}}
