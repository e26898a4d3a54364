"""Who serves an operator: by name or automatically, and what is said when it can't be served."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from ops_cases import backends_here, random

from pyalpaca.ops import backend, backend_report, cpp, extension, flash_attention, npu, reference, rms_norm
from pyalpaca.ops.backend import OPERATORS, choose

needs_cpp = pytest.mark.skipif("cpp" not in backends_here(), reason="the extension is not built")
X = random(2, 16)


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYALPACA_BACKEND", raising=False)


@needs_cpp
def test_the_automatic_choice_is_cpp_on_cpu_and_the_reference_for_float64() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose("rms_norm", X.to(dtype)) is cpp
    assert choose("rms_norm", X.double()) is reference


def test_the_environment_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYALPACA_BACKEND", "reference")
    assert choose("rms_norm", X) is reference
    monkeypatch.setenv("PYALPACA_BACKEND", "gpu")
    with pytest.raises(ValueError, match="PYALPACA_BACKEND: found 'gpu', expected one of auto, cpp, npu, reference"):
        choose("rms_norm", X)


def test_the_innermost_block_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYALPACA_BACKEND", "npu")
    with backend("auto"), backend("reference"):
        assert choose("rms_norm", X) is reference
    with pytest.raises(ValueError, match="found 'tpu'"), backend("tpu"):
        pass


def test_a_backend_asked_for_by_name_that_cannot_serve_says_why() -> None:
    with backend("cpp"), pytest.raises(ValueError, match=r"'cpp', asked for by name, can't serve rms_norm: .*"):
        rms_norm(X.double(), X[0].double(), 1e-6)
    if npu.problem() is not None:
        with backend("npu"), pytest.raises(ValueError, match="can't serve rms_norm: torch_npu"):
            rms_norm(X, X[0], 1e-6)


@needs_cpp
def test_an_automatic_choice_that_falls_back_says_so_once() -> None:
    q = random(1, 4, 1, 20)
    with pytest.warns(UserWarning, match="flash_attention falls back to plain torch: head_dim is 20"):
        flash_attention(q, q, q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash_attention(q, q, q)


@pytest.mark.parametrize("built_with", ["2.9.1", "1.13.0+cpu"])
def test_an_extension_built_with_another_torch_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_with: str
) -> None:
    info = tmp_path / "_C.build.json"
    info.write_text(json.dumps({"torch": built_with, "compiler": "g++"}))
    monkeypatch.setattr(extension, "_BUILD_INFO", info)
    monkeypatch.setattr(extension, "problem", extension.problem.__wrapped__)
    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(extension, "module", lambda: pytest.fail("loaded all the same"))
    found = extension.problem()
    assert found is not None
    assert f"was built with torch {built_with}, but torch {torch.__version__} is installed" in found
    assert "install pyalpaca again" in found
    with backend("cpp"), pytest.raises(ValueError, match="was built with torch"):
        rms_norm(X, X[0], 1e-6)
    assert all(row.backend == "reference" and "was built with torch" in row.reason for row in backend_report())


def test_an_extension_that_is_not_built_leaves_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_BUILD_INFO", tmp_path / "none.json")
    monkeypatch.setattr(extension, "problem", extension.problem.__wrapped__)
    with pytest.warns(UserWarning, match="rms_norm falls back to plain torch: the extension pyalpaca._C is not built"):
        assert torch.equal(rms_norm(X, X[0], 1e-6), reference.rms_norm(X, X[0], 1e-6))


@needs_cpp
def test_the_report_names_each_operator_its_backend_and_why() -> None:
    rows = backend_report()
    assert [row.operator for row in rows] == list(OPERATORS)
    if npu.problem() is not None:
        assert all(row.backend == "cpp" and "C++ kernels for" in row.reason for row in rows)
        with backend("npu"):
            assert all(row.backend == "none" and "torch_npu" in row.reason for row in backend_report())
