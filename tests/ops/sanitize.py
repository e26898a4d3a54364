"""Run the operators' tests on kernels that watch themselves: `make sanitize`, or

    python tests/ops/sanitize.py [address|thread] [pytest's arguments]

address: the whole extension is built with AddressSanitizer and UndefinedBehaviorSanitizer under build/sanitize/, beside the one
in use, and tests/ops is run on it; what lies outside a tensor, or is undefined, ends the run with a report.
thread: the kernels are built with ThreadSanitizer around a thread pool of its own (thread_driver.cpp): torch's OpenMP is not
instrumented, and a sanitizer that does not see its barriers takes every hand-over for a race.
Needs g++ or clang++ with the sanitizers' runtime libraries.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHECKS = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
# It counts pages, of which a watched process has other numbers.
LEFT_OUT = ("test_memory.py",)


def setup_module() -> ModuleType:
    """setup.py, which knows how to find torch and to build the extension."""
    spec = importlib.util.spec_from_file_location("pyalpaca_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def runtime(compiler: Sequence[str], name: str) -> str:
    """The file of one of the compiler's runtime libraries."""
    found = subprocess.run([*compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"sanitize: {shlex.join(compiler)} has no {name}, expected the sanitizers' libraries; install them")
    return str(Path(found).resolve())


def watched_package(setup: Any, compiler: list[str], folder: Path) -> Path:
    """A folder for PYTHONPATH: this source's package around an extension built with the checks."""
    os.environ["CXXFLAGS"], os.environ["LDFLAGS"] = CHECKS, CHECKS
    torch = setup.check_torch(setup.find_torch())
    built = setup.compile_extension(torch, compiler, folder / f"torch-{torch.version}")
    package = folder / "package/pyalpaca"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (ROOT / "pyalpaca").iterdir():
        if not entry.name.startswith("_C."):
            (package / entry.name).symlink_to(entry)
    setup.replace(built, package / built.name)
    (package / setup.BUILD_INFO).write_text(f'{{"torch": "{torch.version}", "compiler": "{shlex.join(compiler)}, checked"}}\n')
    return package.parent


def check_address(arguments: Sequence[str]) -> int:
    """Build with the checks and run the tests; pytest's exit status."""
    setup = setup_module()
    compiler = setup.find_compiler()
    folder = ROOT / "build/sanitize/address"
    folder.mkdir(parents=True, exist_ok=True)
    package = watched_package(setup, compiler, folder)
    libraries = [runtime(compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "LD_PRELOAD": " ".join(libraries),
        # Python keeps what it has until it ends.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    tests = [str(path) for path in sorted((ROOT / "tests/ops").glob("test_*.py")) if path.name not in LEFT_OUT]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not long", "-p", "no:cacheprovider", *(arguments or tests)]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def check_threads() -> int:
    """Build the kernels and their driver with ThreadSanitizer and run it; its exit status."""
    compiler = setup_module().find_compiler()
    folder = ROOT / "build/sanitize/thread"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O2", "-g1", "-fsanitize=thread", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"]
    flags += ["-DPYALPACA_ISA=baseline", f"-I{ROOT}/csrc", "-pthread"]
    sources = [ROOT / "tests/ops/thread_driver.cpp", *(ROOT / f"csrc/cpu/{name}.cpp" for name in KERNELS)]
    program = folder / "driver"
    subprocess.run([*compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
    # Without randomised addresses: older runtimes know only some places of a program in memory.
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run([*prefix, str(program)], env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}, check=False).returncode


KERNELS = ("rms_norm", "rope", "swiglu", "adamw", "flash_attention", "flash_attention_backward", "decode_attention")
KERNELS += ("store_cache", "linear", "lora_merge", "product_sum", "cross_entropy")


def main() -> int:
    kind, *arguments = sys.argv[1:] or ["address"]
    if kind not in ("address", "thread"):
        raise SystemExit(f"sanitize: found {kind!r}, expected address or thread")
    return check_address(arguments) if kind == "address" else check_threads()


if __name__ == "__main__":
    raise SystemExit(main())
