"""Large results come from memory that is handed out again: never while it is held, and not more than a limit lies idle."""

from __future__ import annotations

import gc

import pytest
import torch
from ops_cases import backends_here, random

from pyalpaca.ops import rms_norm

pytestmark = pytest.mark.skipif("cpp" not in backends_here(), reason="the extension is not built")
X, WEIGHT = random(600, 1024), torch.ones(1024)  # 2.4 MB


def test_what_is_dropped_is_handed_out_again():
    first = rms_norm(X, WEIGHT, 1e-6)
    place = first.data_ptr()
    del first
    assert rms_norm(X, WEIGHT, 1e-6).data_ptr() == place


def test_what_is_held_is_not():
    first = rms_norm(X, WEIGHT, 1e-6)
    kept, expected = first[3:5], first[3:5].clone()  # a view holds all of it
    del first
    gc.collect()
    others = [rms_norm(2 * X + i, WEIGHT, 1e-6) for i in range(4)]
    assert len({x.data_ptr() for x in (kept, *others)}) == 5
    assert torch.equal(kept, expected)


def test_idle_memory_has_a_limit():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    held = [rms_norm(X, WEIGHT, 1e-6) for _ in range(400)]  # about 1 GB
    assert resident() - before > 800_000_000
    del held
    gc.collect()
    assert resident() - before < 700_000_000
