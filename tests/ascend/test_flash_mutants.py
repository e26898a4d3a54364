"""Attention with one thing spoilt is found out, at least 95 % of all such kernels; the share is printed."""

from __future__ import annotations

import ctypes
from collections import Counter

import pytest
import torch
from mutants import FLASH_FILES, Mutant, mutants_of, write_sources
from npu_flash import Cut, flash_decode, flash_forward
from npu_kernels import kernel_library
from test_flash import expect, inputs
from test_flash_backward import GradientCut, check
from test_flash_decode import check as check_decode
from test_mutants import found_by

# lengths, heads, head_dim, causal, offset, cut, seed; a row of q of the last one has an infinity, and in that of ALONE one key
# has scores so far above all others that who overlooks it in the maximum overflows.
FORWARDS = [
    ((70, 200), (3, 1), 64, True, 100, Cut(), 1),
    ((45, 310), (2, 1), 80, False, 0, Cut(stack=256, chunk=2048), 5),
    ((100, 150), (2, 2), 16, True, -70, Cut(), 20),
    ((33, 200), (1, 1), 128, True, 160, Cut(), 23),
    ((128, 150), (1, 1), 16, True, 40, Cut(cores=1, q_tile=128, kv_tile=64, chunk=4096), 7),
    ((130, 250), (2, 1), 64, True, 90, Cut(stack=128, chunk=2048, share=2), 5),
    ((45, 380), (1, 1), 16, False, 0, Cut(stack=192, chunk=2048), 5),
    ((40, 500), (1, 1), 16, False, 0, Cut(stack=384, chunk=4096, share=2), 7),
    ((95, 600), (1, 1), 32, False, 0, Cut(stack=512, chunk=4096, share=2), 1),
    ((90, 30), (1, 1), 48, False, 0, Cut(cores=1, q_tile=16), 7),
]

ALONE, ALONE_KEY = 6, 67


def forward_is_right(library: ctypes.CDLL, prefix: str) -> None:
    for case, (lengths, heads, head_dim, causal, q_offset, cut, seed) in enumerate(FORWARDS):
        qkv = inputs(1, *lengths, heads, head_dim, torch.float16)
        if case == len(FORWARDS) - 1:
            qkv[0][0, 2, 0, 3] = float("inf")
        if case == ALONE:
            qkv[1][0, ALONE_KEY] *= 400
        expect(flash_forward(library, *qkv, causal, q_offset, cut=cut, seed=seed, prefix=prefix), qkv, causal, q_offset)


# The same for gradients.
BACKWARDS = [
    ((100, 100), (3, 1), 64, True, 20, GradientCut(), 1),
    ((37, 310), (1, 1), 80, False, 0, GradientCut(kv_block=256, chunk=2048), 5),
    ((65, 150), (2, 2), 16, True, -40, GradientCut(side=16, q_block=32, kv_block=64), 20),
    ((130, 33), (1, 1), 128, True, 160, GradientCut(side=32, q_block=32), 23),
    ((128, 70), (1, 1), 16, True, 40, GradientCut(cores=1, side=64, q_block=128, kv_block=128, chunk=4096), 7),
    ((40, 330), (1, 1), 16, False, 0, GradientCut(cores=1), 5),  # one step for each of many keys
    ((40, 330), (1, 1), 16, False, 0, GradientCut(cores=1), 22),
    ((300, 330), (1, 1), 128, True, 30, GradientCut(cores=1, side=64, q_block=128, kv_block=64, chunk=4096), 7),  # all full
]


def backward_is_right(library: ctypes.CDLL, prefix: str) -> None:
    for lengths, heads, head_dim, causal, q_offset, cut, seed in BACKWARDS:
        check(library, lengths, heads, head_dim, torch.float16, causal, q_offset, cut=cut, seed=seed, prefix=prefix)


def decode_is_right(library: ctypes.CDLL, prefix: str) -> None:
    check_decode(library, 3, 300, (8, 2), 64, torch.float16, prefix=prefix)
    check_decode(library, 1, 300, (64, 64), 16, torch.float16, cut=Cut(1, q_tile=16), prefix=prefix)  # rows in full
    check_decode(library, 2, 0, (70, 70), 48, torch.float16, cut=Cut(1, q_tile=16), seed=5, prefix=prefix)
    q, k, v = inputs(1, 1, 200, (6, 2), 64, torch.float16)
    q[0, 0, 1, 3] = float("inf")
    expect(flash_decode(library, q, k, v, seed=7, prefix=prefix), [q, k, v], False, 0)


CHECKS = {"flash_forward": forward_is_right, "flash_backward": backward_is_right, "flash_decode": decode_is_right}


def test_the_kernels_themselves_pass_what_is_to_find_mutants() -> None:
    library = kernel_library()
    for is_right in CHECKS.values():
        is_right(library, "")


@pytest.mark.long
@pytest.mark.parametrize("backward", [False, True], ids=["forward and decode", "backward"])
def test_spoilt_kernels_are_found_out(backward: bool) -> None:
    files = [file for file, kernels in FLASH_FILES.items() if (kernels[0] == "flash_backward") == backward]
    mutants = [mutant for file in files for mutant in mutants_of(file)]
    sound = [Mutant("none", file, 0, 0, "", 1) for file in files]  # not spoilt: nothing may be found
    library = kernel_library(write_sources([*mutants, *sound]))
    by = [found_by(library, mutant, number, CHECKS) for number, mutant in enumerate([*mutants, *sound])]
    assert by[len(mutants) :] == [None] * len(sound)
    by = by[: len(mutants)]
    alive = [str(mutant) for mutant, fault in zip(mutants, by, strict=True) if fault is None]
    kinds, faults = Counter(mutant.kind for mutant in mutants), Counter(by)
    print(f"\n{len(mutants) - len(alive)} of {len(mutants)} mutants found out; {dict(kinds)}; by {dict(faults)}; alive: {alive}")
    assert set(kinds) == {"flag", "pair", "buffer", "offset", "tail"}
    assert len(alive) <= 0.05 * len(mutants)
