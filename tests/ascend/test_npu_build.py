"""Where CANN's toolkit is, installing builds the kernels or ends with one message; what was built runs on torch's device npu."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from simulated_npu import TOOLKIT, Machine, simulated_npu

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import setup
import setup_npu

ROOT = Path(__file__).resolve().parents[2]
ROUTES = ("ascendc", "asc")


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for part in ("tools", "lib64", "bin"):
        shutil.copytree(TOOLKIT / part, tmp_path / "cann" / part)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "cann"))
    monkeypatch.setenv("SOC_VERSION", "ascend910b2")
    return tmp_path / "cann"


def npu_smi(folder: Path, board: str) -> None:
    """A program npu-smi that tells of one NPU, number 3, in the words of the real one."""
    program = folder / "npu-smi"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in\n"info -l") echo "\tTotal Count   : 1"; echo "\tNPU ID        : 3";;\n'
        f"\"info -t board -i 3 -c 0\") printf '{board}';;\nesac\n"
    )
    program.chmod(0o755)


@pytest.mark.parametrize("soc", ["ascend910b1", "ascend910b2", "Ascend910B3", "ascend910b4", "ascend910_9391", "ascend910_9382"])
def test_processors_that_the_kernels_run_on(toolkit: Path, monkeypatch: pytest.MonkeyPatch, soc: str) -> None:
    monkeypatch.setenv("SOC_VERSION", soc)
    assert setup_npu.find_toolkit(toolkit).soc == soc.lower()


@pytest.mark.parametrize("soc", ["ascend910b", "ascend910a", "ascend310p3", "910b2", "ascend910b5"])
def test_other_processors_are_refused(toolkit: Path, monkeypatch: pytest.MonkeyPatch, soc: str) -> None:
    monkeypatch.setenv("SOC_VERSION", soc)
    with pytest.raises(SystemExit, match=f"SOC_VERSION is '{soc}', expected ascend910b1, .* or ascend910_93xx; set SOC_VERSION"):
        setup_npu.find_toolkit(toolkit)


def test_without_soc_version_the_machine_is_asked(toolkit: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SOC_VERSION")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    npu_smi(tmp_path, r"\tChip Name     : 910B4\n\tNPU Name      : NA\n")
    assert setup_npu.find_soc() == "ascend910b4"
    npu_smi(tmp_path, r"\tChip Name     : Ascend910\n\tNPU Name      : 9392\n")
    assert setup_npu.find_soc() == "ascend910_9392"
    npu_smi(tmp_path, r"\tChip Name     : 910A\n")
    with pytest.raises(SystemExit, match="npu-smi found 'ascend910a', expected ascend910b1"):
        setup_npu.find_soc()
    (tmp_path / "npu-smi").unlink()
    with pytest.raises(SystemExit, match="no NPU found by npu-smi, expected one or its name in the variable SOC_VERSION"):
        setup_npu.find_soc()


def test_a_folder_that_is_no_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"no ascendc.cmake found in .* expected CANN's toolkit 8.1 or newer; .* unset ASCEND"):
        setup_npu.find_toolkit(tmp_path)
    monkeypatch.setenv("PYALPACA_NPU_ROUTE", "asc")
    with pytest.raises(SystemExit, match=r"no asc-config.cmake found in .* 9.0 or newer; .* unset PYALPACA_NPU_ROUTE, or unset"):
        setup_npu.find_toolkit(tmp_path)


@pytest.mark.parametrize(("route", "place"), [(route, place) for route in ROUTES for place in setup_npu.CMAKE_FOLDERS[route]])
def test_each_place_of_the_toolkit_s_cmake_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str, place: str
) -> None:
    monkeypatch.setenv("SOC_VERSION", "ascend910b2")
    monkeypatch.setenv("PYALPACA_NPU_ROUTE", route)
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / setup_npu.CMAKE_FILES[route]).touch()
    assert setup_npu.find_toolkit(tmp_path).cmake == tmp_path / place


def test_routes_that_there_are(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYALPACA_NPU_ROUTE", raising=False)
    assert setup_npu.find_toolkit(toolkit).route == "ascendc"
    monkeypatch.setenv("PYALPACA_NPU_ROUTE", "bisheng")
    with pytest.raises(SystemExit, match=r"^pyalpaca: PYALPACA_NPU_ROUTE is 'bisheng', expected ascendc .* or asc .*; set it to"):
        setup_npu.find_toolkit(toolkit)


def test_torch_npu_must_be_that_of_torch(tmp_path: Path) -> None:
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu/version.py").write_text("__version__ = '2.5.1.post1'\n")
    with pytest.raises(
        SystemExit, match=r"found torch_npu 2.5.1.post1 in .* beside torch 2.13.0\+cpu, expected 2.13.\*; `pip ins"
    ):
        setup_npu.find_torch_npu([tmp_path], "2.13.0+cpu")
    found = setup_npu.find_torch_npu([tmp_path / "none", tmp_path], "2.5.1")
    assert found is not None and found.version == "2.5.1.post1"
    with pytest.raises(SystemExit, match="has no C\\+\\+ headers"):
        setup_npu.check_torch_npu(found, "2.5.1")
    with pytest.raises(SystemExit, match="no torch_npu found, expected one to compile the launches against; `pip install"):
        setup_npu.check_torch_npu(None, "2.13.0")


def test_an_isolated_build_brings_the_torch_npu_of_torch(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = setup.Torch(Path("/nowhere"), "2.12.1+cpu")
    monkeypatch.setattr(setup, "package_folders", lambda package: [])
    assert setup.requirements_of_the_build(torch) == ["torch_npu==2.12.*"]
    assert setup.requirements_of_the_build(None) == [setup.TESTED_TORCH, "torch_npu==2.13.*"]
    monkeypatch.delenv("ASCEND_HOME_PATH")
    assert setup.requirements_of_the_build(torch) == []


def test_the_source_distribution_has_all_that_the_build_reads(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path), "--formats=tar"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar")
    names = {name.partition("/")[2] for name in subprocess.check_output(["tar", "tf", archive], text=True).split()}
    wanted = {"setup_npu.py", *(str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*") if file.is_file())}
    assert wanted <= names


# ---- with a compiler: a machine of stand-ins


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return simulated_npu(tmp_path_factory.mktemp("npu"))


@pytest.mark.long
@pytest.mark.parametrize("route", ROUTES)
def test_a_kernel_that_does_not_compile_fails_the_installation(machine: Machine, tmp_path: Path, route: str) -> None:
    source = tmp_path / "source"
    tracked = subprocess.check_output(
        ["git", "ls-files", "csrc", "pyalpaca", "setup*.py", "*.toml", "CMakeLists.txt", "README.md"], cwd=ROOT
    )
    for name in tracked.decode().split():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    kernel = source / "csrc/ascend/kernels/rope.cpp"
    kernel.write_text(kernel.read_text().replace("Mul(left, left, cos", "Multiply(left, left, cos", 1))
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-temp",
        str(tmp_path / "t"),
        "--build-lib",
        str(tmp_path / "l"),
    ]
    environment = machine.environment | {"PYALPACA_NPU_ROUTE": route}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Multiply" in done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"pyalpaca: compiling the kernels for ascend910b2 with {machine.toolkit} failed, see above")
    assert f"try PYALPACA_NPU_ROUTE={next(other for other in ROUTES if other != route)}, or unset ASCEND_HOME_PATH" in last
    assert not list((tmp_path / "l").rglob("*.so"))


@pytest.mark.long
@pytest.mark.parametrize("route", ROUTES)
def test_what_was_built_serves_the_operators_on_the_device(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    for name, value in (machine.environment | {"PYALPACA_NPU_ROUTE": route}).items():
        monkeypatch.setenv(name, value)
    torch, toolkit = setup.check_torch(setup.find_torch()), setup_npu.find_toolkit(machine.toolkit)
    torch_npu = setup_npu.check_torch_npu(setup_npu.find_torch_npu([machine.packages], torch.version), torch.version)
    options = setup.cmake_options(torch, setup.find_compiler())
    built = setup_npu.compile_npu(ROOT / "csrc/ascend", tmp_path / "build", toolkit, torch_npu, options, setup.tool("cmake"))
    # An installed package: the sources' modules beside what was built.
    package = tmp_path / "site-packages/pyalpaca"
    shutil.copytree(ROOT / "pyalpaca", package, ignore=shutil.ignore_patterns("_C_npu*", "*npu_kernels*", "__pycache__"))
    for file in built:
        shutil.copyfile(file, package / file.name)
    info = {"torch": torch.version, "torch_npu": torch_npu.version, "soc": toolkit.soc, "toolkit": str(machine.toolkit)}
    (package / setup_npu.BUILD_INFO).write_text(json.dumps(info))
    paths = os.pathsep.join([str(machine.packages), str(package.parent), str(Path(__file__).parent)])

    def outcome(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = machine.environment | {"PYTHONPATH": paths, "PYTHONWARNINGS": "error"} | variables
        return subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    def run(*command: str) -> str:
        done = outcome(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    doctor = run("-m", "pyalpaca.cli", "doctor")
    assert f"NPU kernels     for ascend910b2, built with torch_npu 2.13.0 and CANN in {machine.toolkit}" in doctor
    for operator in ("rms_norm", "rope"):
        assert re.search(
            rf"{operator} +npu +the automatic choice, our kernel for ascend910b2, built with torch_npu 2.13.0", doctor
        )
    assert "as the oracle" in run(str(Path(__file__).with_name("on_the_device.py")))
    # There a launch would do nothing and report success.
    other = outcome(str(Path(__file__).with_name("on_the_device.py")), SIMULATED_SOC="Ascend310P3")
    assert other.returncode != 0
    assert "the NPU is Ascend310P3, expected Ascend 910B1 to B4 or 910_93" in other.stdout + other.stderr
