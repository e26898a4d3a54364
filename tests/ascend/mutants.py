"""The kernels with one thing spoilt each: a flag dropped, a buffer too short, an offset shifted, a tail skipped."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from emulation import BUILD
from npu_kernels import KERNELS

# Which kernels a file is part of.
FILES = {
    "rms_norm.cpp": ("rms_norm",),
    "rms_norm_backward.cpp": ("rms_norm_backward",),
    "rope.cpp": ("rope",),
    "swiglu.cpp": ("swiglu",),
    "rows.h": ("rms_norm", "rms_norm_backward"),
    "common.h": ("rms_norm", "rms_norm_backward", "rope"),
}
FLASH_FILES = {
    "flash_places.h": ("flash_forward",),
    "flash_tasks.h": ("flash_forward",),
    "flash_cube.h": ("flash_forward",),
    "flash_softmax.h": ("flash_forward", "flash_backward", "flash_rows"),
    "flash_forward_cube.h": ("flash_forward",),
    "flash_forward_vector.h": ("flash_forward", "flash_decode", "flash_merge"),  # decoding's results are fp32
    "flash_backward_tasks.h": ("flash_backward", "flash_rows"),
    "flash_backward_cube.h": ("flash_backward", "flash_rows"),
    "flash_backward_vector.h": ("flash_backward", "flash_rows"),
    "flash_rows.cpp": ("flash_backward", "flash_rows"),
    "flash_decode.cpp": ("flash_decode", "flash_merge"),
    "flash_merge.cpp": ("flash_decode", "flash_merge"),
}
_FLASH = ("flash_places.h", "flash_cube.h", "flash_tasks.h", "flash_softmax.h")
_FORWARD = (*_FLASH, "flash_forward_cube.h", "flash_forward_vector.h", "flash_forward_cores.h")
# What a kernel's own file includes, in this order.
INCLUDED = {
    "rms_norm": ("rows.h",),
    "rms_norm_backward": ("rows.h",),
    "rope": (),
    "swiglu": (),
    "flash_forward": _FORWARD,
    "flash_backward": (*_FLASH, "flash_backward_tasks.h", "flash_backward_cube.h", "flash_backward_vector.h"),
    "flash_rows": ("flash_places.h", "rows.h"),
    "flash_decode": _FORWARD,
    "flash_merge": ("flash_places.h", "flash_softmax.h"),
}
# The kernels in such a file, where there are several.
SEVERAL = {
    "swiglu": ("swiglu", "swiglu_backward"),
    "rms_norm_backward": ("rms_norm_backward", "rms_norm_dgamma"),
    "flash_rows": ("flash_delta", "flash_round"),
}
FLAG = re.compile(r"(?:CrossCore)?(?:Set|Wait)Flag(?:<[^;()]*>)?\([^;]*;|(?<!if \()\bPipeBarrier<[^;]*;")
BUFFER = re.compile(r"(InitBuffer\(\w+, )([^;]*)\);")
SUBSCRIPT = re.compile(r"(?<=[\w)])\[([^\[\]]*)\]")
# Arrays of flags, tensors and tiles: what stands in their brackets is no offset.
NUMBERED = re.compile(r"(\w*filled|computed|emptied|row|in|out|wide|stride|tiles)_?|\w*lanes")
TAILS = [  # what takes a rest into account, and what does not
    (re.compile(r"tile\.width - column < (\w+) \? tile\.width - column : \w+"), r"\1"),
    (re.compile(r"\w+\.end - row < tile_rows_ \? [^:]* : tile_rows_"), "tile_rows_"),
    (re.compile(r"if \(rest > 0\)"), "if (false)"),
    (re.compile(r"row < range_\.end;"), "row + tile_rows_ <= range_.end;"),
    (re.compile(r"count - at < chunk \? count - at : chunk"), "chunk"),
    (re.compile(r"width - begin < columns \? width - begin : columns"), "columns"),
    (re.compile(r"shape_\.tokens - token_ < shape_\.tile_tokens \? [^:]*: shape_\.tile_tokens"), "shape_.tile_tokens"),
    (re.compile(r"heads_ - first_ < shape_\.tile_heads \? heads_ : "), ""),
    (re.compile(r"\(value \+ step - 1\) / step"), "value / step"),
    (re.compile(r"\(core < more \? 1 : 0\)"), "0"),
    (re.compile(r"\(heads_ \+ shape_\.tile_heads - 1\) /"), "heads_ /"),
    (re.compile(r"\(shape_\.tokens \+ shape_\.tile_tokens - 1\) /"), "shape_.tokens /"),
    (re.compile(r"rows_left < shape_\.tile_rows \? [^:]* : "), ""),
    (re.compile(r"left < shape_\.tile_columns \? left : "), ""),
    (re.compile(r"\(shape_\.(width|rows) \+ shape_\.tile_\w+ - 1\) /"), r"shape_.\1 /"),
]

FLASH_TAILS = [
    (re.compile(r"rest < shape_\.kv_tile \? static_cast<int32_t>\(rest\) : "), ""),
    (re.compile(r"if \(keys <= 0\) return;"), ";"),
    (re.compile(r"if \(part == 0 && walk\.first\(\)\) [^;]*;"), ";"),
    (re.compile(r"tiles_\[member\]\.keys <= key"), "false"),
    (re.compile(r"rest < rows \? rest : "), ""),
    (re.compile(r"rows - row < most \? rows - row : "), ""),
    (re.compile(r"all - part \* side_ < side_ \? [^:]*: "), ""),
    (re.compile(r"kv_len - key < of\.stack \? [^:]*: "), ""),
    (re.compile(r"keys_\.q_len - row_ < shape_\.q_block \? [^:]*: "), ""),
    (re.compile(r"(?:length_ - row|count_ - at) < (\w+) \? [^:]*: \w+"), r"\1"),
    (re.compile(r"rows_ - row < (\w+) \? [^:]*: \w+"), r"\1"),
    (re.compile(r"first < 0 \? 0 : first"), "0"),
    (re.compile(r"if \(!walk\.first\(\)\) SetAtomicAdd<float>\(\);"), ";"),
    (re.compile(r"in_turn \? more : 0"), "0"),
    (re.compile(r"rest < shape_\.stack \? [^:]*: "), ""),
    (re.compile(r"left < shape_\.q_tile \? .*: "), ""),
    (re.compile(r"columns - column < (\w+) \? columns - column : \w+"), r"\1"),
    (re.compile(r"\((\w+) \+ [\w.]+ - 1\) / "), r"\1 / "),
    (re.compile(r"fill_rest\((?!const)[^;]*;"), ";"),
    (re.compile(r"if \((?:shape_|of_)\.causal && [^;]*;"), ";"),
    (re.compile(r"if \(kept \+ shape\.rows - 1 <= 0\)"), "if (kept <= 0)"),
    (re.compile(r"rows == 1 \? 2 : rows"), "rows"),
    (re.compile(r"end < 0 \? 0 : end"), "end < 0 ? 1 : end"),
    (re.compile(r"if \(tile\.rows == 1\) [^;]*;"), ";"),
    (re.compile(r"(k\w+Slots = )(?:kAhead \+ 1|kLate)\b"), r"\1 1"),  # slots that are used again too early
    (re.compile(r"(?<=\w\()now, max, up\);\n"), "now, now, up);\n"),
    (re.compile(r"\bkLowest\b(?=, )"), "minus_infinity()"),
    (re.compile(r"Maxs\(safe, total\[row\], kSmallestSum, up\);"), "Maxs(safe, total[row], 0.0f, up);"),
]


@dataclass(frozen=True)
class Mutant:
    """One change of one file: `text` in place of the characters [start, end), and of those of `also`."""

    kind: str
    file: str
    start: int
    end: int
    text: str
    line: int
    also: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {self.file}:{self.line} -> {self.text!r}"


def kernels_of(file: str) -> tuple[str, ...]:
    """The kernels that a file is part of."""
    return (FILES | FLASH_FILES)[file]


def code_of(file: str) -> str:
    """The source without comments, each replaced by spaces: a place keeps its line."""
    text = (KERNELS / "kernels" / file).read_text()
    return re.sub(r"//[^\n]*", lambda comment: " " * len(comment.group()), text)


def mutants_of(file: str) -> list[Mutant]:
    text = code_of(file)
    found: list[Mutant] = []

    def add(kind: str, start: int, end: int, new: str) -> None:
        found.append(Mutant(kind, file, start, end, new, text.count("\n", 0, start) + 1))

    for match in FLAG.finditer(text):
        add("flag", *match.span(), ";")
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}  # all uses of a flag: what is left is paired, and wrong
    for match in FLAG.finditer(text):
        if event := re.search(r"<(HardEvent::\w+)>\((\w+)", match.group()):
            pairs.setdefault((event[1], event[2]), []).append(match.span())
    for (start, end), *rest in pairs.values():
        found.append(Mutant("pair", file, start, end, ";", text.count("\n", 0, start) + 1, tuple(rest)))
    for match in BUFFER.finditer(text):
        add("buffer", *match.span(), f"{match[1]}{match[2]} - 32);")
    for match in SUBSCRIPT.finditer(text):
        before = re.search(r"(\w+)\W*$", text[: match.start()])
        declared = re.fullmatch(r"\d", match[1]) is not None
        if declared or (before and NUMBERED.fullmatch(before[1])):
            continue  # a declaration, or the number of a flag
        add("offset", *match.span(), f"[{match[1]} + 8]")
    for pattern, new in FLASH_TAILS if file in FLASH_FILES else TAILS:
        for match in pattern.finditer(text):
            add("tail", *match.span(), match.expand(new))
    return found


def source_of(mutant: Mutant, number: int) -> str:
    """The kernels of a mutant in a namespace of their own, known to the emulation as mNUMBER_NAME."""
    kernels = kernels_of(mutant.file)
    parts = []
    included = dict.fromkeys(file for kernel in kernels for file in INCLUDED[kernel])
    for file in ("common.h", *included, *(f"{kernel}.cpp" for kernel in kernels)):
        text = code_of(file)
        if file == mutant.file:
            for start, end in sorted([(mutant.start, mutant.end), *mutant.also], reverse=True):
                text = text[:start] + mutant.text + text[end:]
        text = re.sub(r"^#(?:pragma once|include .*)$", "", text, flags=re.M).replace('extern "C" ', "inline ")
        parts.append(re.sub(r"^PYALPACA_\w+\(\w+, bfloat16_t\)$", "", text, flags=re.M))
    dtypes = ("half",) if mutant.file in FLASH_FILES else ("half", "float")
    names = [f"{name}_{dtype}" for kernel in kernels for name in SEVERAL.get(kernel, (kernel,)) for dtype in dtypes]
    known = [
        f'static const emu::Registration r_{name}("m{number}_{name}", [](const uint64_t* w) {{ emu::call_with<{name}>(w, {name}, '
        f"emu::word_indices<{name}>({name})); }}, emu::num_words<{name}>({name}));"
        for name in names
    ]
    undefined = [f"#undef {name}" for name in re.findall(r"#define (\w+)", "\n".join(parts))]
    return "\n".join([f"namespace m{number} {{", *parts, *known, "}", *undefined, ""])


def write_sources(mutants: list[Mutant], per_file: int = 12) -> list[Path]:
    """Files that hold all mutants, numbered as in the list."""
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = []
    for start in range(0, len(mutants), per_file):
        part = [source_of(mutant, start + i) for i, mutant in enumerate(mutants[start : start + per_file])]
        text = "\n".join(['#include "emu/host.h"', '#include "kernel_operator.h"', *part])
        source = BUILD / f"mutants-{hashlib.sha256(text.encode()).hexdigest()[:20]}.cpp"
        source.write_text(text)
        sources.append(source)
    return sources
