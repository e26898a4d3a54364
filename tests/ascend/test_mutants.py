"""A kernel with one thing spoilt is found out: at least 95 % of all such kernels, and the share is printed."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from emulation import FaultError
from mutants import FILES, Mutant, kernels_of, mutants_of, write_sources
from npu_kernels import kernel_library, rms_norm, rms_norm_backward, rope
from test_kernels import EPS, TOLERANCE, angles, assert_near, gradient_oracle, norm_oracle, random
from test_swiglu_kernels import check_swiglu

from pyalpaca.ops import reference

# rows (in full tiles and a rest), width, type, with a residual, rows a tile, seed
NORMS = [
    (21, 300, torch.float16, True, 4, 1),
    (21, 300, torch.float32, True, 4, 5),
    (45, 64, torch.float16, False, 8, 3),
    (7, 4131, torch.float32, False, 1, 7),
    (9, 2500, torch.float16, True, 2, 2),
]
ROPES = [
    ((5, 2), 64, torch.float16, True, (3, 4), 1),
    ((3, 2), 128, torch.float32, False, (4, 5), 5),
    ((4, 4), 64, torch.float16, False, (2, 4), 3),
]
# rows, width, type, rows and columns a tile, seed
GATES = [
    (13, 100, torch.float16, (4, 100), 1),
    (13, 100, torch.float32, (4, 100), 5),
    (7, 600, torch.float16, (2, 256), 3),
    (5, 600, torch.float32, (1, 256), 7),
]


def norm_is_right(library: ctypes.CDLL, prefix: str) -> None:
    for rows, width, dtype, residual, tile, seed in NORMS:
        x, gamma, other = random(rows, width, dtype=dtype), random(width), random(rows, width, dtype=dtype, seed=1)
        found = rms_norm(library, x, gamma, EPS, other if residual else None, seed, 2, prefix, tile)
        for value, expected in zip(found, norm_oracle(x, gamma, other if residual else None), strict=True):
            assert_near(value, expected.double(), TOLERANCE[value.dtype])


def gradient_is_right(library: ctypes.CDLL, prefix: str) -> None:
    for rows, width, dtype, residual, tile, seed in NORMS:
        x, gamma, dy = random(rows, width, dtype=dtype), random(width), random(rows, width, dtype=dtype, seed=1)
        dsum = random(rows, width, dtype=dtype, seed=2) if residual else None
        found = rms_norm_backward(library, dy, x, gamma, norm_oracle(x, gamma)[2].float(), dsum, seed, 3, prefix, tile)
        dx, dgamma = gradient_oracle(dy, x, gamma)
        assert_near(found[0], dx + (0 if dsum is None else dsum.double()), TOLERANCE[dtype])
        assert_near(found[1], dgamma, TOLERANCE[dtype])


def rope_is_right(library: ctypes.CDLL, prefix: str) -> None:
    for heads, head_dim, dtype, positions, tile, seed in ROPES:
        tokens, (cos, sin) = 17, angles(40, head_dim)
        q_width, k_width = heads[0] * head_dim, heads[1] * head_dim
        qkv = random(tokens, q_width + 2 * k_width, dtype=dtype)
        at = torch.arange(tokens) * 7 % 40 if positions else torch.arange(tokens)
        slots = torch.arange(tokens).flip(0)
        slots[3] = -1
        caches = [torch.zeros(tokens, heads[1], head_dim, dtype=dtype) for _ in range(2)]
        found = rope(library, qkv, heads, cos, sin, at if positions else None, (slots, *caches), positions, seed, 3, prefix, tile)
        q, k, v = (part.view(tokens, -1, head_dim) for part in qkv.split([q_width, k_width, k_width], 1))
        c, s = cos[at].double()[None], sin[at].double()[None] * (-1 if positions else 1)
        for value, x in zip(found, (q, k), strict=False):
            assert_near(value, reference.rope(x.double()[None], c, s)[0], TOLERANCE[dtype])
        for cache, stored in zip(found[2:], (found[1], v), strict=True):
            wanted = torch.zeros_like(cache)
            wanted[slots[slots >= 0]] = stored[slots >= 0]
            assert torch.equal(cache, wanted)


def swiglu_is_right(library: ctypes.CDLL, prefix: str) -> None:
    for rows, width, dtype, tile, seed in GATES:
        check_swiglu(library, rows, width, dtype, seed, cores=2, prefix=prefix, tile=tile)


CHECKS: dict[str, Callable[[ctypes.CDLL, str], None]] = {
    "rms_norm": norm_is_right,
    "rms_norm_backward": gradient_is_right,
    "rope": rope_is_right,
    "swiglu": swiglu_is_right,
}


Check = Callable[[ctypes.CDLL, str], None]


def found_by(library: ctypes.CDLL, mutant: Mutant, number: int, checks: dict[str, Check]) -> str | None:
    """The name of the fault that gave a mutant away, "values" if its results did, None if nothing did."""
    try:
        for kernel in kernels_of(mutant.file):
            if kernel in checks:
                checks[kernel](library, f"m{number}_")
    except FaultError as fault:
        return fault.name
    except AssertionError:
        return "values"
    return None


def test_the_kernels_themselves_pass_what_is_to_find_mutants() -> None:
    library = kernel_library()
    for check in CHECKS.values():
        check(library, "")


@pytest.mark.long
def test_spoilt_kernels_are_found_out() -> None:
    mutants = [mutant for file in FILES for mutant in mutants_of(file)]
    sound = [Mutant("none", file, 0, 0, "", 1) for file in FILES]  # not spoilt: nothing may be found
    library = kernel_library(write_sources([*mutants, *sound]))
    by = [found_by(library, mutant, number, CHECKS) for number, mutant in enumerate([*mutants, *sound])]
    assert by[len(mutants) :] == [None] * len(sound)
    by = by[: len(mutants)]
    alive = [str(mutant) for mutant, fault in zip(mutants, by, strict=True) if fault is None]
    kinds, faults = Counter(mutant.kind for mutant in mutants), Counter(by)
    print(f"\n{len(mutants) - len(alive)} of {len(mutants)} mutants found out; {dict(kinds)}; by {dict(faults)}; alive: {alive}")
    assert set(kinds) == {"flag", "pair", "buffer", "offset", "tail"}
    assert len(alive) <= 0.05 * len(mutants)
