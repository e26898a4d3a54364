"""Large results come from memory that is handed out again: never while it is held, and not more than a limit lies idle."""

from __future__ import annotations

import gc
import os
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ops_cases import backends_here, random

from pyalpaca.ops import idle_memory, reuse_memory, rms_norm

pytestmark = pytest.mark.skipif("cpp" not in backends_here(), reason="the extension is not built")
X, WEIGHT = random(600, 1024), torch.ones(1024)  # 2.4 MB


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


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
    reuse_memory(False)  # a command that another test has called may have left more idle
    before = resident()
    held = [rms_norm(X, WEIGHT, 1e-6) for _ in range(400)]  # about 1 GB
    assert resident() - before > 800_000_000
    del held
    gc.collect()
    assert resident() - before < 700_000_000


@pytest.fixture
def reused():
    """All of torch's tensors come from the pool."""
    assert reuse_memory()
    yield
    reuse_memory(False)


def test_all_of_torchs_tensors_come_from_it_if_wanted(reused):
    first = X + 1
    place = first.data_ptr()
    del first
    second = torch.empty_like(X)
    assert second.data_ptr() == place
    kept = second.resize_(2, 600, 1024).fill_(3.0)  # what the storage holds is carried over
    assert torch.equal(kept, torch.full((2, 600, 1024), 3.0))


def test_tensors_outlive_the_switch():
    reuse_memory()
    first, small = X + 1, torch.ones(5)
    reuse_memory(False)
    second = X + 1
    assert torch.equal(first, second) and small.sum() == 5
    del first, second


def test_it_keeps_no_more_than_was_needed_at_once(reused):
    base = resident()
    held = [X + i for i in range(300)]
    peak = resident() - base
    del held
    gc.collect()
    for width in (1024, 1100, 1200, 1500, 1900):  # other sizes do not come on top
        held = [torch.ones(600, width) for _ in range(300 * 1024 // width)]
        del held
    assert resident() - base < peak + 60_000_000  # and some gaps
    reuse_memory(False)
    assert idle_memory() <= 2**29


def test_other_sizes_take_the_place_of_what_was_dropped(reused):
    """As gradients take that of activations: neighbours that are idle are one block, which is cut again."""
    held = [torch.ones(600, 1024) for _ in range(40)]
    for rows in (700, 1300, 2900):
        del held
        idle = idle_memory()
        held = [torch.full((rows, 1024), float(i)) for i in range(40 * 600 // rows)]
        assert idle - idle_memory() == pytest.approx(sum(x.nbytes for x in held), rel=0.03)
        assert all(bool((x == i).all()) for i, x in enumerate(held))


def test_a_forked_child_may_use_it(reused):
    first = X + 1
    read, write = os.pipe()
    if (child := os.fork()) == 0:  # only torch's single-threaded work is allowed in a forked child
        torch.set_num_threads(1)
        second = torch.empty_like(X)
        second.copy_(first)
        os.write(write, b"+" if torch.equal(first, second) and second.data_ptr() != first.data_ptr() else b"-")
        os._exit(0)
    assert os.read(read, 1) == b"+"
    os.waitpid(child, 0)


def test_many_threads_take_and_give(reused):
    def work(seed: int) -> bool:
        for i in range(60):
            x = torch.full((300_000 + 10_000 * (i % 7),), float(seed))
            if not bool((x == seed).all()):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_the_environment_forbids_it(monkeypatch):
    monkeypatch.setenv("PYALPACA_REUSE_MEMORY", "0")
    assert not reuse_memory()


def test_no_room_is_said(reused):
    with pytest.raises(torch.OutOfMemoryError, match=r"the system has no .* bytes of memory left, expected room for a tensor"):
        torch.empty(2**50, dtype=torch.uint8)


def test_steps_of_training_touch_no_new_pages(reused):
    weight = torch.randn(1024, 1024, requires_grad=True)

    def step() -> None:
        y = X
        for _ in range(4):
            y = rms_norm(torch.nn.functional.silu(y @ weight), WEIGHT, 1e-6)
        torch.autograd.grad(y.sum(), weight)

    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 600  # one tensor of 2.4 MB alone has 600 pages
