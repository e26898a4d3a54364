"""Kernels on the emulation of csrc/emu, launched on tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyalpaca.bench.ascend.library import build_library as build_library

ROOT = Path(__file__).resolve().parents[2]
EMU = ROOT / "csrc/emu"
BUILD = ROOT / "build/emu"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-w", f"-I{EMU}/include", f"-I{ROOT}/csrc"]
AIV_ONLY, AIC_ONLY, MIX_AIV_1_0, MIX_AIC_1_0, MIX_AIC_1_1, MIX_AIC_1_2 = range(6)


class FaultError(Exception):
    """What the emulation found wrong; the text starts with the name of the fault."""

    @property
    def name(self) -> str:
        return str(self).split(":")[0]


@dataclass(frozen=True)
class Output:
    """A tensor that a kernel is to write whole; `part` allows bytes that stay unwritten."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    part: bool = False


Argument = Tensor | Output | int | float | None


def launch(
    library: ctypes.CDLL,
    kernel: str,
    blocks: int,
    arguments: Mapping[str, Argument],
    seed: int = 0,
    kind: int = AIV_ONLY,
    in_place: Sequence[str] = (),
    inside: Mapping[str, tuple[str, int]] | None = None,
) -> dict[str, Tensor]:
    """Run a kernel; its outputs, and the inputs named by `in_place`. Faults where the emulation finds one.

    A Tensor is read, an Output written, None is a null pointer, an int or a float a scalar (fp32). `inside` names pointers
    into another argument, given before it, with their distance in bytes.
    """
    library.emu_reset()
    words: list[int] = []
    results: dict[str, tuple[int, Tensor, bool]] = {}
    place = {name: i for i, name in enumerate(arguments)}
    for name, value in arguments.items():
        if inside and name in inside:
            words.append(words[place[inside[name][0]]] + inside[name][1])
        elif isinstance(value, Tensor):
            held = value.contiguous()
            size = held.numel() * held.element_size()
            address = library.emu_tensor(
                name.encode(), ctypes.c_void_p(held.data_ptr() or 1), ctypes.c_uint64(size), int(name not in in_place)
            )
            if name in in_place:
                results[name] = (address, torch.empty_like(held), True)
            words.append(address)
        elif isinstance(value, Output):
            out = torch.empty(value.shape, dtype=value.dtype)
            address = library.emu_tensor(name.encode(), None, ctypes.c_uint64(out.numel() * out.element_size()), 0)
            results[name] = (address, out, value.part)
            words.append(address)
        elif isinstance(value, float):
            words.append(int(torch.tensor(value, dtype=torch.float32).view(torch.int32).item()) & 0xFFFFFFFF)
        else:
            words.append(int(value or 0) & 0xFFFFFFFFFFFFFFFF)
    text = ctypes.create_string_buffer(2000)
    packed = (ctypes.c_uint64 * len(words))(*words)
    if library.emu_launch(kernel.encode(), kind, blocks, ctypes.c_uint64(seed), packed, len(words), text, ctypes.c_uint64(2000)):
        raise FaultError(text.value.decode(errors="replace"))
    for name, (address, out, part) in results.items():
        missing = library.emu_unwritten(ctypes.c_uint64(address))
        if missing and not part:
            raise FaultError(f"unwritten: {kernel}: {missing} bytes of {name} were never written")
        library.emu_read(
            ctypes.c_uint64(address), ctypes.c_void_p(out.data_ptr() or 1), ctypes.c_uint64(out.numel() * out.element_size())
        )
    return {name: out for name, (_, out, _) in results.items()}
