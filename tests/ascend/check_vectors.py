"""Replay recorded calls on the emulation: `python tests/ascend/check_vectors.py FILE` prints `N passed, M failed` and which.

A line of FILE is one call with its inputs and its output, or one that must be refused. Calls that the real headers do not
compile must not compile here either; others must end in a fault.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from emulation import BUILD, FLAGS, build_library

DTYPES = {
    "half": np.float16, "float": np.float32, "int8": np.int8, "uint8": np.uint8, "int16": np.int16, "uint16": np.uint16,
    "int32": np.int32, "uint32": np.uint32, "int64": np.int64,
}  # fmt: skip
MEMORIES = {"VECCALC": 0, "A1": 1, "B1": 1, "A2": 2, "B2": 3, "CO1": 4}
SIZES = {"half": 2, "bfloat16_t": 2, "float": 4} | {f"{u}int{bits}_t": bits // 8 for u in ("", "u") for bits in (8, 16, 32, 64)}
DECLARATION = re.compile(r"(\w+): (Local|Global)Tensor<(\w+)> (\w+).*? (\d+) (elements|bytes)")
GENERATED_PER_FILE = 130


def tensors_of(case: dict[str, Any]) -> list[tuple[str, str, str, str, int, int]]:
    """(name, Local or Global, type, position, bytes, address) of each tensor of a call."""
    used = dict.fromkeys(range(5), 0)
    found = []
    memory = case["memory"].replace(" (UB, 32-byte aligned start)", "")
    for name, kind, element, position, number, unit in DECLARATION.findall(memory):
        size = int(number) * (SIZES[element] if unit == "elements" else 1)
        address = 0
        if kind == "Local":
            address = used[MEMORIES[position]]
            used[MEMORIES[position]] += (size + 31) // 32 * 32
        found.append((name, kind, element, position, size, address))
    return found


def function_of(index: int, case: dict[str, Any]) -> str:
    """C++ that declares the tensors, makes the call and is known to the emulation as case_INDEX."""
    lines = [f"void case_{index}(const uint64_t* words) {{", "  using namespace AscendC; (void)words;"]
    for place, (name, kind, element, position, size, address) in enumerate(tensors_of(case)):
        if kind == "Global":
            pointer = f"reinterpret_cast<{element}*>(words[{place}])"
            lines.append(f"  GlobalTensor<{element}> {name}; {name}.SetGlobalBuffer({pointer}, {size // SIZES[element]});")
        else:
            lines.append(f"  LocalTensor<{element}> {name}(emu::Local{{TPosition::{position}, {address}, {size}, -1, 0}});")
            lines.append(f"  emu_fill({MEMORIES[position]}, {address}, reinterpret_cast<void*>(words[{place}]), {size});")
    return "\n".join([*lines, case.get("setup") or "", case["call"], "}"])


HEAD = '#include "emu/host.h"\n#include "kernel_operator.h"\nextern "C" void emu_fill(int, uint32_t, const void*, uint64_t);\n'


def content(name: str, case: dict[str, Any], size: int) -> bytes:
    """The bytes of a tensor before the call."""
    given = case["inputs"].get(name)
    if given is None:
        return b"\xa5" * size
    filled = bytes.fromhex(given.get("hex", ""))
    return filled + bytes(size - len(filled))


def as_numbers(raw: bytes, dtype: str) -> np.ndarray[Any, Any]:
    if dtype == "bfloat16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, DTYPES[dtype])


def difference(case: dict[str, Any], found: bytes) -> str | None:
    """How the content of out differs from what was recorded, or None."""
    expected, dtype = bytes.fromhex(case["out"]["hex"]), case["out"]["dtype"]
    looked_at = np.zeros(len(expected), bool)
    for start, end in case.get("compare_bytes") or [[0, len(expected)]]:
        looked_at[start:end] = True
    a, b = as_numbers(found, dtype), as_numbers(expected, dtype)
    same = (np.frombuffer(found, np.uint8) == np.frombuffer(expected, np.uint8)).reshape(len(a), -1)
    same = (same | ~looked_at.reshape(len(a), -1)).all(1)
    if a.dtype.kind == "f":
        same |= np.isnan(a) & np.isnan(b)
        if not case["exact"]:
            summed = re.search("Sum|Mmad", case["api"]) is not None
            tolerance = {"half": 8e-2 if summed else 2e-3}.get(dtype, 1e-4 if summed else 2e-6)
            with np.errstate(invalid="ignore"):
                wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
                same |= np.abs(wide_a - wide_b) <= tolerance * (1 + np.abs(wide_b))
    if same.all():
        return None
    first = int(np.argmin(same))
    return f"{int((~same).sum())} of {len(a)} elements differ, the first at {first}: {a[first]}, expected {b[first]}"


def run_case(library: ctypes.CDLL, index: int, case: dict[str, Any], seed: int) -> str | None:
    """Why a call that compiles failed, or None."""
    library.emu_reset()
    tensors = tensors_of(case)
    held = [ctypes.create_string_buffer(content(name, case, size), size) for name, _, _, _, size, _ in tensors]
    words = [
        library.emu_tensor(name.encode(), buffer, ctypes.c_uint64(size), 0) if kind == "Global" else ctypes.addressof(buffer)
        for (name, kind, _, _, size, _), buffer in zip(tensors, held, strict=True)
    ]
    text = ctypes.create_string_buffer(2000)
    packed = (ctypes.c_uint64 * 1)(ctypes.addressof(array := (ctypes.c_uint64 * len(words))(*words)))
    kind, size = (0 if case["core"] == "AIV" else 1), ctypes.c_uint64(2000)
    failed = library.emu_launch(f"case_{index}".encode(), kind, 1, ctypes.c_uint64(seed), packed, 1, text, size)
    del array
    if "rejected" in case:
        return None if failed else f"accepted, expected a refusal: {case['rejected']}"
    if failed:
        return text.value.decode(errors="replace")
    for word, (name, where, _, position, bytes_of_it, address) in zip(words, tensors, strict=True):
        if name == "out":
            found, length = ctypes.create_string_buffer(bytes_of_it), ctypes.c_uint64(bytes_of_it)
            if where == "Global":
                library.emu_read(ctypes.c_uint64(word), found, length)
            else:
                library.emu_peek(MEMORIES[position], address, found, length)
            return difference(case, found.raw)
    return "no tensor named out"


def accepted_by_the_compiler(cases: list[tuple[int, dict[str, Any]]]) -> list[int]:
    """Those of the cases that compile, though they should not."""
    text, starts = HEAD, []
    for index, case in cases:
        starts.append((text.count("\n") + 1, index))
        text += function_of(index, case) + "\n"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "refused.cpp"
        source.write_text(text)
        command = ["g++", *FLAGS, "-fsyntax-only", "-fmax-errors=0", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = {int(line) for line in re.findall(r"refused\.cpp:(\d+)", done.stderr)}
    ends = [start for start, _ in starts[1:]] + [text.count("\n") + 2]
    return [index for (start, index), end in zip(starts, ends, strict=True) if not any(start <= line < end for line in lines)]


def check(path: Path, seed: int = 0) -> dict[str, str | None]:
    """Each call's id, and why it failed or None; `seed` chooses the order in which pipes run."""
    cases = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    refused = [(i, case) for i, case in enumerate(cases) if case.get("rejected_by", "").startswith("does not compile")]
    running = [(i, case) for i, case in enumerate(cases) if (i, case) not in refused]
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = []
    for start in range(0, len(running), GENERATED_PER_FILE):
        part = running[start : start + GENERATED_PER_FILE]
        body = "\n".join(function_of(i, case) for i, case in part)
        entry = "[](const uint64_t* w) {{ case_{i}(reinterpret_cast<const uint64_t*>(w[0])); }}"
        line = 'static const emu::Registration r{i}("case_{i}", ' + entry + ", 1);"
        table = "\n".join(line.format(i=i) for i, _ in part)
        text = HEAD + body + "\n" + table + "\n"
        source = BUILD / f"vectors-{hashlib.sha256(text.encode()).hexdigest()[:20]}.cpp"
        source.write_text(text)
        sources.append(source)
    library = build_library(sources, ["-O0"])
    outcome = {case["id"]: run_case(library, i, case, seed) for i, case in running}
    wrong = set(accepted_by_the_compiler(refused)) if refused else set()
    outcome.update({case["id"]: "compiles, expected a refusal" if i in wrong else None for i, case in refused})
    return outcome


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path, help="calls, one JSON object a line")
    outcome = check(parser.parse_args(argv).file)
    failed = {name: why for name, why in outcome.items() if why}
    for name, why in failed.items():
        print(f"{name}: {why}")
    print(f"{len(outcome) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
