"""The kernels of csrc/ascend as functions on tensors, cut as their tiling says (or as `tile` does) and run on the emulation."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from emulation import Output, launch
from torch import Tensor

from pyalpaca.bench.ascend import library as kernels
from pyalpaca.bench.ascend.library import kernel_library as kernel_library

KERNELS = Path(__file__).resolve().parents[2] / "csrc/ascend"
NAMES = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float"}


def tiling(library: ctypes.CDLL, name: str, *arguments: int) -> tuple[int, ...]:
    """What the tiling function `name` says: cores first, 0 if it refuses; bytes of unified memory last."""
    return kernels.tiling(library, name, *arguments)[:4]


def rms_norm(
    library: ctypes.CDLL,
    x: Tensor,
    gamma: Tensor,
    eps: float,
    residual: Tensor | None = None,
    seed: int = 0,
    cores: int = 8,
    prefix: str = "",
    tile: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h and rstd of rows x (N, D); h is x where there is no residual."""
    (rows, width), size = x.shape, x.element_size()
    used, tile_rows, _, _ = tiling(library, "rms_norm", rows, width, size, int(residual is not None), cores)
    out = launch(
        library,
        f"{prefix}rms_norm_{NAMES[x.dtype]}",
        used,
        {
            "x": x,
            "residual": residual,
            "gamma": gamma,
            "y": Output((rows, width), x.dtype),
            "sum": None if residual is None else Output((rows, width), x.dtype),
            "rstd": Output((rows,), torch.float32),
            "rows": rows,
            "stride": width,
            "width": width,
            "tile_rows": tile or tile_rows,
            "eps": float(eps),
            "inverse_width": 1.0 / width,
        },
        seed,
    )
    return out["y"], out.get("sum", x), out["rstd"]


def rms_norm_backward(
    library: ctypes.CDLL,
    dy: Tensor,
    x: Tensor,
    gamma: Tensor,
    rstd: Tensor,
    dsum: Tensor | None = None,
    seed: int = 0,
    cores: int = 8,
    prefix: str = "",
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """dx and dgamma, the latter in the type of x."""
    (rows, width), size, name = x.shape, x.element_size(), NAMES[x.dtype]
    used, tile_rows, buffers, _ = tiling(library, "rms_norm_backward", rows, width, size, 0, cores)
    first = launch(
        library,
        f"{prefix}rms_norm_backward_{name}",
        used,
        {
            "dy": dy,
            "x": x,
            "gamma": gamma,
            "rstd": rstd,
            "dsum": dsum,
            "dx": Output((rows, width), x.dtype),
            "parts": Output((used, width), torch.float32),
            "rows": rows,
            "dy_stride": width,
            "x_stride": width,
            "width": width,
            "tile_rows": tile or tile_rows,
            "buffers": buffers,
            "inverse_width": 1.0 / width,
        },
        seed,
    )
    second_cores, columns, _, _ = tiling(library, "dgamma", used, width, 0, 0, cores)
    second = launch(
        library,
        f"{prefix}rms_norm_dgamma_{name}",
        second_cores,
        {"parts": first["parts"], "dgamma": Output((width,), x.dtype), "num_parts": used, "width": width, "columns": columns},
        seed,
    )
    return first["dx"], second["dgamma"]


def rope(
    library: ctypes.CDLL,
    qkv: Tensor,
    heads: tuple[int, int],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    cache: tuple[Tensor, Tensor, Tensor] | None = None,
    inverse: bool = False,
    seed: int = 0,
    cores: int = 8,
    prefix: str = "",
    tile: tuple[int, int] | None = None,
) -> Sequence[Tensor]:
    """q and k turned, out of a fused projection (N, (H + 2K) d); with `cache` = (slots, k, v) the two caches too."""
    (tokens, stride), size, (q_heads, k_heads) = qkv.shape, qkv.element_size(), heads
    head_dim = 2 * cos.shape[-1]
    used, tile_tokens, tile_heads, _ = tiling(
        library, "rope", tokens, q_heads, k_heads, head_dim, size, int(cache is not None), cores
    )
    tile_tokens, tile_heads = tile or (tile_tokens, tile_heads)
    q_width, k_width = q_heads * head_dim, k_heads * head_dim
    slots, k_cache, v_cache = cache if cache is not None else (None, None, None)
    # One tensor, three pointers into it: what a fused projection is.
    arguments: dict[str, Tensor | Output | int | float | None] = {"q": qkv, "k": None, "v": None}
    arguments |= {"cos": cos, "sin": sin, "positions": positions, "slots": slots}
    arguments |= {
        "q_out": Output((tokens, q_heads, head_dim), qkv.dtype),
        "k_out": Output((tokens, k_heads, head_dim), qkv.dtype),
    }
    arguments |= {"k_cache": k_cache, "v_cache": v_cache, "tokens": tokens, "q_stride": stride, "k_stride": stride}
    arguments |= {"v_stride": stride, "q_out_stride": q_width, "k_out_stride": k_width, "cache_stride": k_width}
    arguments |= {"period": cos.shape[0], "q_heads": q_heads, "k_heads": k_heads, "head_dim": head_dim}
    arguments |= {"tile_tokens": tile_tokens, "tile_heads": tile_heads, "inverse": int(inverse)}
    inside = {"k": ("q", q_width * size), "v": ("q", (q_width + k_width) * size)}
    out = launch(
        library, f"{prefix}rope_{NAMES[qkv.dtype]}", used, arguments, seed, in_place=("k_cache", "v_cache"), inside=inside
    )
    return [out[name] for name in ("q_out", "k_out", "k_cache", "v_cache") if name in out]


def swiglu(
    library: ctypes.CDLL,
    fused: Tensor,
    dy: Tensor | None = None,
    seed: int = 0,
    cores: int = 8,
    prefix: str = "",
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, ...]:
    """y of gate and up, the halves of the rows of `fused` (N, 2 F); with `dy` dgate and dup."""
    (rows, stride), size, name = fused.shape, fused.element_size(), NAMES[fused.dtype]
    width = stride // 2
    used, tile_rows, tile_columns, _ = tiling(library, "swiglu", rows, width, size, int(dy is not None), cores)
    tile_rows, tile_columns = tile or (tile_rows, tile_columns)
    result = Output((rows, width), fused.dtype)
    shape: dict[str, Tensor | Output | int | float | None] = {"rows": rows}
    shape |= {} if dy is None else {"dy_stride": width}
    shape |= {"gate_stride": stride, "up_stride": stride, "width": width}
    shape |= {"tile_rows": tile_rows, "tile_columns": tile_columns}
    inside = {"up": ("gate", width * size)}
    if dy is None:
        out = launch(
            library, f"{prefix}swiglu_{name}", used, {"gate": fused, "up": None, "y": result, **shape}, seed, inside=inside
        )
        return (out["y"],)
    arguments = {"dy": dy, "gate": fused, "up": None, "dgate": result, "dup": result, **shape}
    out = launch(library, f"{prefix}swiglu_backward_{name}", used, arguments, seed, inside=inside)
    return out["dgate"], out["dup"]
