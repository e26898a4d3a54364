"""What torch.save of one torch version makes of some trees, kept in data/saved_by_torch.json for versions that are not installed.

Run under any torch, with no pyalpaca: `python tests/checkpoint/saved_by_torch.py [--large]` adds that torch's facts to the file.
With --large it also saves the LARGE trees, which takes 9 GB of memory, and of disk where temporary files go.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

FACTS = Path(__file__).parent / "data" / "saved_by_torch.json"
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
GIB4 = 2**32
# Zeros. At 2**32 - 1 the zip format changes: for a record's size, and for the place of a record.
LARGE = {
    "below.pth": {"a": ((3,), "float16"), "below": ((GIB4 - 2,), "uint8"), "b": ((5,), "float32"), "empty": ((0,), "float32")},
    "edge.pth": {"edge": ((GIB4 - 1,), "uint8"), "c": ((2, 3), "float16"), "d": ((GIB4 // 2,), "float16")},
}


def counting(*shape: int, dtype: str = "float16", start: int = 0) -> torch.Tensor:
    """start, start + 1, ..., from 50 on again from 0."""
    count = torch.empty(shape, device="meta").numel()
    return ((torch.arange(count) + start) % 50).to(getattr(torch, dtype)).reshape(shape)


def llama(layers: int, dtype: str = "float16") -> dict[str, Any]:
    tree = {"tok_embeddings.weight": counting(7, 4, dtype=dtype)}
    for i in range(layers):
        for j, name in enumerate(("attention.wq", "attention.wo", "feed_forward.w1", "attention_norm")):
            tree[f"layers.{i}.{name}.weight"] = counting(*((4, 4), (4, 2), (6, 4), (4,))[j], dtype=dtype, start=9 * i + j)
    return {**tree, "norm.weight": counting(4, dtype=dtype), "output.weight": counting(7, 4, dtype=dtype, start=1)}


def trees() -> dict[str, dict[str, Any]]:
    """{file name: what is saved to it}."""
    part = {"word_embeddings.weight": counting(8, 4)}
    encoder = {"layers.0.input_layernorm.weight": counting(4), "layers.0.mlp.gate_proj.weight": counting(6, 4, dtype="float32")}
    numbers = [0, 1, -1, 255, 256, 65536, 2**31, -(2**31), 2**40, 2**80, 0.0, -1.5, 1e300, True, False, None]
    return {
        "consolidated.00.pth": llama(2),
        "pytorch_model-00001-of-00002.bin": llama(30, "bfloat16"),
        "model_optim_rng.pt": {
            "checkpoint_version": 3.0,
            "model": {"language_model": {"embedding": part, "encoder": encoder}},
            "iteration": 1200,
            "dp_world_size": 0,
        },
        "adapter_model.bin": {"lora_A.weight": counting(2, 8, dtype="float32"), "lora_B.weight": counting(8, 2, dtype="float32")},
        "dtypes.pt": {name: counting(3, 5, dtype=name) for name in DTYPES},
        "shapes.pt": {str(s): counting(*s) for s in ((), (0,), (1,), (1, 1, 5), (3, 0, 2), (300,), (2, 70000), (1, 2, 3, 4, 5))},
        "values.pt": {
            "numbers": numbers,
            "texts": ["", "cpu", "storage", "cpu", "0", "\u6a21\u578b", "x" * 300],
            "inside": {
                "empty": {},
                "0": counting(2),
                "list": [],
                "tuple": (),
                "nested": (1, (2, [3, ("cpu",)], 4, 5)),
                "one": (1,),
            },
            "cpu": "storage",
        },
        "many.tensors.pth": {f"tensor {i}": counting(i % 5, dtype=DTYPES[i % 10], start=i) for i in range(1300)},
        "\u6a21\u578b.pth": llama(1),
        "no_suffix": llama(0),
        "empty.pt": {},
    }


def small_facts(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def large_facts(path: Path) -> dict[str, Any]:
    """Where the tensors are in a file, their checksums, and one hash of all bytes around them."""
    size, spans, crcs = path.stat().st_size, [], []
    with zipfile.ZipFile(path) as archive:
        records = [info for info in archive.infolist() if "/data/" in info.filename]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for info in records:
            file.seek(info.header_offset)
            start = info.header_offset + 30 + sum(struct.unpack("<2H", file.read(30)[26:]))
            spans.append((start, start + info.file_size))
            crcs.append(info.CRC)
        for (_, start), (stop, _) in zip([(0, 0), *spans], [*spans, (size, size)]):  # noqa: B905 - spelt for old Pythons
            file.seek(start)
            digest.update(file.read(stop - start))
    return {"size": size, "places": [start for start, _ in spans], "crcs": crcs, "around": digest.hexdigest()}


def main() -> None:
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, tree in trees().items():
            torch.save(tree, Path(folder, name))
            facts[name] = small_facts(Path(folder, name))
        for name, tree in LARGE.items() if "--large" in sys.argv else ():
            zeros = {key: torch.zeros(shape, dtype=getattr(torch, dtype)) for key, (shape, dtype) in tree.items()}
            torch.save(zeros, Path(folder, name))
            facts[name] = large_facts(Path(folder, name))
            Path(folder, name).unlink()
    FACTS.parent.mkdir(exist_ok=True)
    known = json.loads(FACTS.read_text()) if FACTS.exists() else {}
    known[torch.__version__.split("+")[0]] = facts
    FACTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
