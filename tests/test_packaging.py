"""The build: one message for each thing that can be missing, honest requirements, and a wheel that works anywhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def setup_script() -> ModuleType:
    """setup.py as a module; its call of setup() does not run."""
    spec = importlib.util.spec_from_file_location("pyalpaca_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pyalpaca_setup"] = module
    spec.loader.exec_module(module)
    return module


def fake_torch(folder: Path, version: str) -> Path:
    (folder / "torch/include/ATen").mkdir(parents=True)
    (folder / "torch/version.py").write_text(f"__version__ = '{version}'\n")
    return folder


def test_without_torch(setup_script: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"no torch found in .*`pip install torch==2.13.0` first, or leave out --no-build-iso"):
        setup_script.check_torch(None)


def test_a_setuptools_that_is_too_old(setup_script: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"found setuptools 66.1.1, expected 77 or newer; `pip install -U setuptools`"):
        setup_script.check_setuptools("66.1.1")


def test_a_torch_that_is_too_old(setup_script: ModuleType, tmp_path: Path) -> None:
    torch = setup_script.Torch(fake_torch(tmp_path, "2.1.0") / "torch", "2.1.0")
    with pytest.raises(SystemExit, match=r"found torch 2.1.0 in .*, expected 2.10 or newer; `pip install torch==2.13.0`"):
        setup_script.check_torch(torch)


def test_a_torch_without_headers(setup_script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no C\\+\\+ headers"):
        setup_script.check_torch(setup_script.Torch(tmp_path, "2.13.0"))


def test_the_torch_beside_which_pyalpaca_will_be_installed_comes_first(
    setup_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_torch(tmp_path, "2.99.1+cpu")
    monkeypatch.setattr(setup_script.sysconfig, "get_path", lambda name: str(tmp_path))
    torch = setup_script.find_torch()
    assert torch.version == "2.99.1+cpu"
    assert setup_script.torch_requirement(torch) == "torch>=2.99.0,<2.100"


def test_no_compiler(setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler found .*expected one that knows C\+\+17; install one"):
        setup_script.find_compiler()


@pytest.mark.parametrize("compiler", ["false", "/nowhere/c++"])
def test_a_compiler_that_does_not_compile(setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(SystemExit, match=re.escape(f"'{compiler}' does not compile C++17")):
        setup_script.find_compiler()


def test_tools_that_are_missing(setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_script, "find_spec", lambda name: None)
    monkeypatch.setattr(setup_script.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="cmake, ninja, pybind11 not found, needed to build; `pip install cmake ninja pybind11`"):
        setup_script.check_tools()


def test_a_build_without_compiler_ends_with_the_message(tmp_path: Path) -> None:
    pytest.importorskip("cmake")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"CXX": "false"}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("pyalpaca: 'false' does not compile C++17")


def test_the_version_torch_was_read_as_is_the_one_imported(setup_script: ModuleType) -> None:
    import torch

    found = setup_script.find_torch()
    assert found.version == torch.__version__
    assert found.cxx11_abi == torch._C._GLIBCXX_USE_CXX11_ABI


@pytest.mark.long
def test_a_wheel_works_in_a_fresh_environment_outside_the_source(tmp_path: Path) -> None:
    def run(*command: str | Path) -> str:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "ASCEND_HOME_PATH")}
        environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("pyalpaca-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("pyalpaca/_C.") and name.endswith(".so") for name in names)
    assert {"pyalpaca/_C.build.json", "pyalpaca/py.typed", "pyalpaca/cli.py"} <= set(names)
    assert {"pyalpaca/demo/data/records.json", "pyalpaca/checkpoint/data/sha256.tsv"} <= set(names)
    assert not any(name.startswith(("tests/", "csrc/")) for name in names)
    assert {"pyalpaca/_csrc/emu/src/timeline.cpp", "pyalpaca/_csrc/ascend/emulated.cpp"} <= set(names)

    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh/bin/python"
    run(python, "-m", "pip", "install", "-c", ROOT / "constraints.txt", wheel)
    program = "import pyalpaca.ops as o; print(o.__file__, {row.backend for row in o.backend_report()})"
    out = run(python, "-c", program)
    assert "fresh" in out and "{'cpp'}" in out
    assert "usage: pyalpaca" in run(tmp_path / "fresh/bin/pyalpaca", "--help")
    modelled = run(tmp_path / "fresh/bin/pyalpaca", "bench", "ascend", "--kernel", "rms_norm", "--shapes", "64x256")
    assert modelled.startswith("modelled, never measured")
