"""The launches of the route asc start every kernel that is declared, with the kernel's own arguments in its order."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from emulation import EMU, ROOT

KERNELS = sorted((ROOT / "csrc/ascend/kernels").glob("*.cpp"))
LAUNCHES = ROOT / "csrc/ascend/launches"
STARTED = re.compile(
    r'extern "C" uint32_t aclrtlaunch_(\w+)\s*\(([^)]*)\)\s*{\s*(\w+)<<<blocks, 0, stream>>>\s*\((.*?)\);', re.DOTALL
)


@cache
def preprocessed(file: Path) -> str:
    command = ["g++", "-std=c++17", "-E", "-P", f"-I{EMU}/include", f"-I{ROOT}/csrc", "-x", "c++", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def names(parameters: str) -> list[str]:
    return [parameter.split()[-1] for parameter in parameters.split(",")]


def kernels_in(text: str) -> dict[str, list[str]]:
    """Names of the arguments by the kernel's name."""
    found = re.findall(r'extern "C"\s+void (\w+)\(([^)]*)\)\s*{\s*emu::declare_kernel_type', text)
    return {kernel: names(parameters) for kernel, parameters in found}


@pytest.mark.parametrize("file", KERNELS, ids=[file.stem for file in KERNELS])
def test_a_launch_hands_on_the_arguments_of_its_kernel(file: Path) -> None:
    text = preprocessed(LAUNCHES / f"{file.stem}.asc")
    kernels, started = kernels_in(text), STARTED.findall(text)
    assert sorted(name for name, *_ in started) == sorted(kernels)
    for name, parameters, kernel, arguments in started:
        assert kernel == name
        assert names(parameters) == ["blocks", "stream", *kernels[name]]
        handed_on = [re.sub(r"pyalpaca_npu::bytes\((\w+)\)", r"\1", argument.strip()) for argument in arguments.split(",")]
        assert handed_on == kernels[name]


def test_every_declared_launch_is_defined_once() -> None:
    declared = re.findall(r"uint32_t aclrtlaunch_(\w+)\(", preprocessed(ROOT / "csrc/ascend/launch/kernels.h"))
    files = sorted(LAUNCHES.glob("*.asc"))
    assert [file.stem for file in files] == [file.stem for file in KERNELS]
    defined = [name for file in files for name, *_ in STARTED.findall(preprocessed(file))]
    assert sorted(defined) == sorted(declared) and len(declared) > 20
