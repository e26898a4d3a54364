"""Every operator registered under torch.ops.pyalpaca, found by asking the registry, passes torch.library.opcheck."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ops_cases import backends_here, random

import pyalpaca.ops
from pyalpaca.ops import extension

pytestmark = pytest.mark.skipif("cpp" not in backends_here(), reason="the extension is not built")


def registered() -> list[str]:
    """The names of all operators of the namespace, without overload names."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.split("::")[1].split(".")[0] for name in names if name.startswith("pyalpaca::")})


def qkv(dtype: torch.dtype, queries: int, keys: int, heads: int, kv_heads: int, grad: bool = False) -> list[torch.Tensor]:
    q = random(2, queries, heads, 16, dtype=dtype)
    tensors = [q, *(random(2, keys, kv_heads, 16, dtype=dtype, seed=s) for s in (1, 2))]
    return [x.requires_grad_(grad) for x in tensors]


def packed_qkv(dtype: torch.dtype, grad: bool = False) -> list[torch.Tensor]:
    return [x[0].detach().requires_grad_(grad) for x in qkv(dtype, 6, 9, 4, 2)]


def packed_starts() -> tuple[Any, ...]:
    return torch.tensor([0, 2, 2, 6]), torch.tensor([0, 3, 4, 9]), 4, 5


def attention_backward(*arguments: Any, name: str = "flash_attention") -> tuple[Any, ...]:
    q, k, v, *rest = arguments
    out, lse = getattr(torch.ops.pyalpaca, name)(q, k, v, *rest)
    return (torch.ones_like(out), q, k, v, out, lse, *rest)


def adamw_lists(dtype: torch.dtype, copies: list[torch.Tensor]) -> tuple[Any, ...]:
    weights, means, squares = ([random(3, 5, seed=seed), random(7, seed=seed).abs()] for seed in range(3))
    squares[0] = squares[0].abs()
    grads = [random(5, 3, dtype=dtype).T, random(7, dtype=dtype)]
    return (weights, grads, means, squares, copies, [0.1, 0.0], 3, 0.1, 0.9, 0.99, 1e-8, 0.5)


def samples() -> dict[str, list[tuple[Any, ...]]]:
    """Operator -> argument lists; an operator without any fails the test below."""
    half, bf16 = torch.float16, torch.bfloat16
    cos, lower = random(5, 4), torch.ones(5, 8, dtype=torch.int16)
    slots, caches = torch.tensor([[0, -1, 9], [3, 1, 2]]), [random(2, 5, 2, 16, dtype=half, seed=seed) for seed in range(2)]
    return {
        "rms_norm": [
            (random(2, 3, 8).requires_grad_(), random(8).requires_grad_(), 1e-6),
            (random(3, 2, 9, dtype=bf16).transpose(0, 1).requires_grad_(), random(9), 1e-5),
        ],
        "rms_norm_backward": [
            (random(2, 3, 8), random(2, 3, 8, seed=1), random(8), random(2, 3).abs()),
            (random(4, 9, dtype=half), random(4, 9, dtype=half), random(9, dtype=half), random(4).abs()),
        ],
        "add_rms_norm": [
            (random(2, 3, 8).requires_grad_(), random(2, 3, 8, seed=1).requires_grad_(), random(8).requires_grad_(), 1e-6),
            (random(3, 2, 9, dtype=bf16).transpose(0, 1), random(2, 3, 9, dtype=bf16).requires_grad_(), random(9), 1e-5),
        ],
        "add_rms_norm_backward": [
            (*(random(2, 3, 8, seed=seed) for seed in range(3)), random(8), random(2, 3).abs()),
            (*(random(4, 9, dtype=half, seed=seed) for seed in range(3)), random(9, dtype=half), random(4).abs()),
        ],
        "swiglu": [
            (random(2, 3, 9).requires_grad_(), random(2, 3, 9, seed=1).requires_grad_()),
            tuple(x.requires_grad_() for x in random(4, 34, dtype=bf16).chunk(2, -1)),
        ],
        "swiglu_backward": [
            tuple(random(2, 3, 9, seed=seed) for seed in range(3)),
            tuple(random(9, 4, dtype=half, seed=seed).T for seed in range(3)),
        ],
        "rope": [
            (random(2, 5, 3, 8).requires_grad_(), cos, cos),
            (random(2, 3, 5, 8, dtype=bf16).transpose(1, 2), random(2, 5, 4), random(2, 5, 4, seed=1), True),
        ],
        "rope_qk": [
            (random(2, 5, 3, 8).requires_grad_(), random(2, 5, 1, 8, seed=1).requires_grad_(), cos, cos),
            (*random(2, 3, 6, 8, dtype=bf16).split((4, 2), 2), random(5, 4), random(5, 4), torch.tensor([[4, 0, 2]] * 2), True),
        ],
        "rope_qk_store": [
            (*qkv(half, 3, 3, 4, 2), random(9, 8), random(9, 8), torch.tensor([[8, 0, 2]] * 2), slots, *caches),
            (*qkv(half, 3, 3, 4, 2), random(3, 8), random(3, 8), None, slots, *caches),
        ],
        "flash_attention": [
            (*qkv(torch.float32, 6, 9, 4, 2, grad=True), True, 3, 0.25),
            (*(x.transpose(1, 2) for x in qkv(half, 3, 3, 5, 5)), False, 0, 0.5),
        ],
        "flash_attention_packed": [
            (*packed_qkv(torch.float32, grad=True), *packed_starts(), True, 0.25),
            (*packed_qkv(half), *packed_starts(), False, 0.5),
        ],
        "linear": [
            (random(2, 3, 8).requires_grad_(), random(5, 8).requires_grad_()),
            (random(20, 8, dtype=bf16).requires_grad_(), random(8, 6, dtype=bf16).T),
            (random(4, 8), random(5, 8, dtype=half).requires_grad_()),
        ],
        "linear_dx": [(random(2, 3, 5).requires_grad_(), random(5, 8).requires_grad_()), (random(5), random(5, 8, dtype=half))],
        "linear_dweight": [(random(2, 3, 5).requires_grad_(), random(2, 3, 8).requires_grad_())],
        "adamw_": [adamw_lists(half, []), adamw_lists(torch.float32, [random(3, 5, dtype=bf16), random(7, dtype=bf16)])],
        "grad_norm": [([random(3, 5), random(7, dtype=half)],)],
        "linear_dweight_add_": [(random(5, 8), random(4, 5, dtype=bf16), random(4, 8, dtype=bf16))],
        "linear_dweight_split": [
            (random(4, 5, dtype=bf16), random(4, 8, dtype=bf16)),
            (random(5, 4, dtype=half).T, random(4, 9, dtype=half)),
        ],
        "linear_dweight_add_split_": [
            (random(5, 8, dtype=bf16), lower, random(4, 5, dtype=bf16), random(4, 8, dtype=bf16), False),
            (random(5, 8, dtype=half), lower, random(4, 5, dtype=half), random(4, 8, dtype=half), True),
        ],
        "logit_sums": [
            (random(4, 70), torch.tensor([3, -100, 72, 0]), 3),
            (random(70, 4, dtype=half).T, torch.tensor([3, -100, 69, 0]), 0),
        ],
        "logit_loss_": [
            (random(4, 70, dtype=bf16), torch.tensor([3, -100, 72, 0]), 3, random(3, 4).abs(), 0.5, True),
            (random(4, 70), torch.tensor([3, -100, 69, 0]), 0, random(3, 4).abs(), 0.5, False),
        ],
        "linear_quantized": [
            (random(2, 3, 70).requires_grad_(), *pyalpaca.ops.quantize(random(5, 70), 4, 32), 32),
            (random(20, 70, dtype=bf16).requires_grad_(), *pyalpaca.ops.quantize(random(5, 70), 8), 96),
        ],
        "linear_quantized_dx": [
            (random(2, 3, 5).requires_grad_(), *pyalpaca.ops.quantize(random(5, 70), 4, 32), 32, 70),
            (random(4, 5, dtype=half), *pyalpaca.ops.quantize(random(5, 70), 8), 96, 70),
        ],
        "store_cache": [
            (random(2, 3, 2, 8), torch.zeros(2, 9, 2, 8, dtype=bf16), None, 4),
            (random(2, 3, 2, 8, dtype=half), torch.zeros(2, 2, 9, 8, dtype=torch.int8).transpose(1, 2), torch.zeros(2, 9, 2), 0),
        ],
        "cached_attention": [
            (random(2, 1, 4, 8), *(random(2, 9, 2, 8, dtype=half, seed=s) for s in (1, 2)), None, None, 7, 0.5),
            (random(2, 3, 2, 8), *[torch.ones(2, 9, 2, 8, dtype=torch.int8)] * 2, *[random(2, 9, 2)] * 2, 9, 0.5),
        ],
        "lora_merge": [
            (random(6, 9), [random(6, 2)], [random(2, 9)], [0.5]),
            (random(30, 5, dtype=half).T, [random(5, 8), random(5, 3)], [random(8, 30), random(3, 30)], [4.0, 1.0]),
        ],
        "flash_attention_backward": [
            attention_backward(*qkv(torch.float32, 6, 9, 4, 2), True, 3, 0.25),
            attention_backward(*qkv(bf16, 7, 7, 2, 2), False, 0, 0.5),
        ],
        "flash_attention_packed_backward": [
            attention_backward(*packed_qkv(bf16), *packed_starts(), True, 0.25, name="flash_attention_packed"),
        ],
    }


def test_every_registered_operator_has_samples() -> None:
    assert registered() == sorted(samples())


@pytest.mark.parametrize("operator", sorted(samples()) if "cpp" in backends_here() else [])
def test_opcheck(operator: str) -> None:
    for arguments in samples()[operator]:
        result = torch.library.opcheck(getattr(torch.ops.pyalpaca, operator).default, arguments)
        assert set(result.values()) == {"SUCCESS"}


def test_meta_tensors_go_through_the_front_door() -> None:
    with pyalpaca.ops.backend("cpp"):
        x = torch.empty(2, 6, 4, 16, device="meta")
        assert pyalpaca.ops.flash_attention(x, x[:, :, :2], x[:, :, :2]).shape == x.shape
        assert pyalpaca.ops.rope(x, torch.empty(6, 8, device="meta"), torch.empty(6, 8, device="meta")).device.type == "meta"
        assert pyalpaca.ops.rms_norm(x, torch.empty(16, device="meta"), 1e-6).shape == x.shape


INSTRUCTION_SETS = ["baseline", "avx2", "avx512", "avx512_bf16"]


@pytest.mark.parametrize("lesser", INSTRUCTION_SETS[:-1])
def test_the_kernels_for_lesser_processors_pass_the_same_tests(lesser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if extension.module().info()["capability"] not in INSTRUCTION_SETS[INSTRUCTION_SETS.index(lesser) + 1 :]:
        pytest.skip("this processor has no more than that, or not as much")
    # In bf16 and fp16 (both names hold "float16"), whose conversions are what differs most between processors.
    monkeypatch.setenv("PYALPACA_CPU", lesser)
    here = Path(__file__).parent
    names = ["rms_norm", "rope", "swiglu", "flash_attention", "cached_attention", "linear", "linear_quantized", "adamw"]
    names += ["linear_digits", "cross_entropy", "rounding", "streamed"]
    files = [str(here / f"test_{name}.py") for name in names]
    chosen = "digits or test_rounding or float16 and (test_streamed or cpp and (oracle or products))"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_an_unknown_instruction_set_is_refused() -> None:
    program = "import torch, pyalpaca._C; pyalpaca._C.info()"
    environment = {**os.environ, "PYALPACA_CPU": "avx1024"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert "PYALPACA_CPU is avx1024, expected one of what this processor has: " in done.stderr
