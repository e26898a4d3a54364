"""One content digest for the same weights in every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from pyalpaca.checkpoint.canonical import Reader, total_bytes
from pyalpaca.checkpoint.container.tensor_file import dtype_name, raw_bytes


def tensor_digests(reader: Reader) -> Iterator[tuple[str, str]]:
    """(canonical name, line) for each tensor in Hugging Face's order, where a line is
    `{sha256 of the bytes, hex} {name} {dtype} {sizes joined by x}`, as in
    `5f70...c1 model.norm.weight float16 4096`; the bytes are row-major and little-endian."""
    with tqdm(total=total_bytes(reader), unit="B", unit_scale=True, desc="digest", disable=None) as bar:
        for name in reader.names:
            data = raw_bytes(reader.read(name))
            shape = "x".join(str(n) for n in reader.shapes[name])
            yield name, f"{hashlib.sha256(data).hexdigest()} {name} {dtype_name(reader.dtypes[name])} {shape}"
            bar.update(len(data))


def digest(reader: Reader) -> str:
    """sha256, hex, of the lines of `tensor_digests`, UTF-8, each ended by a newline.

    It depends on names, shapes, dtypes and values only, not on files, shards, layout or tokenizer.
    """
    return combine(line for _, line in tensor_digests(reader))


def combine(lines: Iterable[str]) -> str:
    """The digest of a checkpoint from its tensors' lines."""
    total = hashlib.sha256()
    for line in lines:
        total.update(line.encode() + b"\n")
    return total.hexdigest()
