"""What the toolkit asks of a kernel's file beside C++: it reads the preprocessed text, and takes a file as one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from emulation import EMU, ROOT

FILES = sorted((ROOT / "csrc/ascend/kernels").glob("*.cpp"))


def preprocessed(file: Path, folder: Path) -> str:
    """A kernel's file as the toolkit's scripts see it, its keywords left as they are."""
    (folder / "kernel_operator.h").write_text("")
    command = ["g++", "-std=c++17", "-E", "-P", f"-I{folder}", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_the_toolkit_finds_every_kernel_and_its_arguments(file: Path, tmp_path: Path) -> None:
    # Up to the first brace after the two keywords; arguments are cut at commas, a type from its name at spaces.
    text = preprocessed(file, tmp_path)
    kernels = re.findall(r"__global__\s*__aicore__\s*(.+?)\s*\{", text, re.DOTALL)
    assert len(kernels) == text.count("__global__") == text.count('extern "C"') > 0
    for kernel in kernels:
        before, _, arguments = kernel.partition("(")
        assert re.fullmatch(r"void \w+", before)
        for argument in arguments.rpartition(")")[0].split(","):
            assert re.fullmatch(r"\s*(GM_ADDR|int64_t|int32_t|float)\s+\w+\s*", argument)


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_all_kernels_of_a_file_run_on_cores_of_one_kind(file: Path, tmp_path: Path) -> None:
    # The type that is found first is taken for all of them.
    text = preprocessed(file, tmp_path)
    kinds = re.findall(r"KERNEL_TASK_TYPE_DEFAULT\((\w+)\)", text)
    assert len(kinds) == text.count("__global__")
    assert len(set(kinds)) == 1


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_parameters_are_made_by_constructors_of_whole_numbers(file: Path, tmp_path: Path) -> None:
    # In braces a number that might not fit its field does not compile, and fields have other names from version to version.
    text = preprocessed(file, tmp_path)
    assert re.findall(r"\b(?:\w+Params|\w+ParamsV220|DataCopyPadExtParams<\w+>)(?:\s+\w+)?\s*\{", text) == []
    assert re.findall(r"\.(?:blockCount|blockLen|(?:src|dst)\w*Stride|quantPre|unitFlag|cmatrix\w+)\b", text) == []


# What the device's compiler has not (asc-devkit: C++ support, restrictions), and its words that are types to it alone.
REFUSED = [
    r"\bstd\s*::",
    r"\b(?:virtual|new|delete|malloc|throw|try|catch|typeid|dynamic_cast|goto|asm|double|thread_local)\b",
    r"\bstatic\s+(?!constexpr|inline)",
    r"\[[&=]?\]\s*\(",
    r"\b(?:half|bfloat16_t)\b\s*(?:[=.;:?{]|<(?!=)|$)",
    r"\d\.\d*(?:e[+-]?\d+)?(?![\def])",
]


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_kernels_use_what_the_compiler_for_the_device_has(file: Path, tmp_path: Path) -> None:
    text = preprocessed(file, tmp_path)
    assert [match[0] for pattern in REFUSED for match in re.finditer(pattern, text, re.MULTILINE)] == []


def test_the_emulation_refuses_what_the_headers_refuse() -> None:
    refused = Path(__file__).with_name("refused.cpp")
    subprocess.run(["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", f"-I{EMU}/include", str(refused)], check=True)
