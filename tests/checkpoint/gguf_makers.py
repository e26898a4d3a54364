"""GGUF files that the official package writes."""

from __future__ import annotations

import gguf
import numpy as np

from pyalpaca.checkpoint.container.gguf_types import stored_spec


def blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bytes of a quantized type; the scales of each block are made finite."""
    generator = np.random.default_rng(seed)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    stored = generator.integers(0, 256, stored_spec(shape, kind)[0], np.uint8)
    flat = stored.reshape(-1, size)
    for at in {
        "Q4_1": (0, 2),
        "Q5_1": (0, 2),
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (208,),
    }.get(kind, (0,)):
        flat[:, at : at + 2] = generator.uniform(0.01, 0.1, (len(flat), 1)).astype(np.float16).view(np.uint8)
    return stored


def official(path, values=None, arrays=None, kinds=None, **how):
    """A file that the official writer makes."""
    writer = gguf.GGUFWriter(path, "llama", **how)
    for key, value in (values or {}).items():
        if key == "general.architecture":
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, np.ndarray):
            kind = "BOOL" if value.dtype == bool else value.dtype.name.upper()
            writer.add_key_value(key, value.tolist(), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kind])
        else:
            writer.add_key_value(key, value.item(), gguf.GGUFValueType[value.dtype.name.upper()])
    for name, array in (arrays or {}).items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kinds[name]] if kinds else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
