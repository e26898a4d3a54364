"""The head and its cross entropy in one equal plain torch in float64, chunk by chunk, and hold no more than a chunk's logits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from ops_cases import DTYPES, TOLERANCE, assert_near, backends_here, not_contiguous, random
from torch import Tensor

from pyalpaca.ops import Shards, backend, chunk_tokens, linear_cross_entropy, reference
from pyalpaca.ops.operators import linear_dweight_add_split_, linear_dweight_split, logit_loss_, logit_sums

BACKENDS = backends_here()


def labels_of(*shape: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Random labels, every fifth of which takes no loss."""
    labels = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    labels.view(-1)[::5] = -100
    return labels


def plain(x: Tensor, weight: Tensor, labels: Tensor, scale: float) -> list[Tensor]:
    """Loss and gradients by torch's own functions in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    logits = leaves[0] @ leaves[1].T
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum") * scale
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def fused(x: Tensor, weight: Tensor, labels: Tensor, scale: float, shards: Shards = Shards()) -> list[Tensor]:  # noqa: B008
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    loss = linear_cross_entropy(*leaves, labels, scale, shards)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [(1, 5, 3), (7, 131, 40), (378, 33, 16), (800, 157, 24)])
def test_equals_plain_torch_in_float64(name: str, dtype: torch.dtype, tokens: int, vocabulary: int, width: int) -> None:
    x, weight = random(tokens, width, dtype=dtype), random(vocabulary, width, dtype=dtype)
    labels = labels_of(tokens + 1, vocabulary=vocabulary)[1:]
    with backend(name):
        found = fused(x, weight, labels, 0.37)
    for value, expected, what in zip(found, plain(x, weight, labels, 0.37), ("loss", "dx", "dweight"), strict=True):
        assert_near(value, expected, 3 * TOLERANCE[dtype], what)
    assert [t.dtype for t in found] == [torch.float32, dtype, dtype]


@pytest.mark.parametrize("name", BACKENDS)
def test_leading_dimensions_strides_and_a_scale_with_a_gradient_of_the_result(name: str) -> None:
    x, weight, labels = not_contiguous(random(2, 200, 24)), not_contiguous(random(50, 24)), labels_of(2, 200, vocabulary=50)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with backend(name):
        loss = linear_cross_entropy(*leaves, labels, torch.tensor(0.5))
        found = torch.autograd.grad(loss * 3, leaves)
    expected = plain(x, weight, labels, 0.5)
    assert_near(loss.detach(), expected[0], 4e-6)
    for value, wanted in zip(found, expected[1:], strict=True):
        assert_near(value, 3 * wanted, 4e-6)


def test_only_the_gradients_asked_for_are_made() -> None:
    x, weight, labels = random(20, 8), random(30, 8), labels_of(20, vocabulary=30)
    whole = fused(x, weight, labels, 1.0)
    leaf = x.clone().requires_grad_()
    loss = linear_cross_entropy(leaf, weight, labels)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], whole[1])
    leaf = weight.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(linear_cross_entropy(x, leaf, labels), leaf)[0], whole[2])
    assert torch.equal(linear_cross_entropy(x, weight, labels), whole[0])


def test_no_label_and_no_token_give_zero() -> None:
    x, weight = random(4, 8), random(30, 8)
    for tokens in (x, x[:0]):
        labels = torch.full((len(tokens),), -100)
        assert all(torch.equal(t, torch.zeros_like(t)) for t in fused(tokens, weight, labels, 1.0))


def test_large_logits_do_not_overflow_and_nan_comes_through() -> None:
    x, weight, labels = random(9, 8) * 40, random(30, 8) * 40, labels_of(9, vocabulary=30)
    for value, expected in zip(fused(x, weight, labels, 1.0), plain(x, weight, labels, 1.0), strict=True):
        assert_near(value, expected, 2e-4)
    x[1, 2] = float("nan")
    loss, dx, dweight = fused(x, weight, labels, 1.0)
    assert loss.isnan() and dx[1].isnan().all() and torch.isfinite(dx[2:]).all() and dweight.isnan().any()


def test_parts_of_the_vocabulary_give_the_whole() -> None:
    """Two ranks as two threads would be: each exchange of one is answered with what the other has sent."""
    import threading

    x, weight, labels = random(400, 16), random(51, 16), labels_of(400, vocabulary=51)
    barrier, slots, results = threading.Barrier(2), [x, x], [[x], [x]]

    def exchange(rank: int, reduce: str, value: Tensor) -> Tensor:
        slots[rank] = value
        barrier.wait()
        both = torch.stack(slots)
        barrier.wait()
        return both.amax(0) if reduce == "max" else both.sum(0)

    def run(rank: int, rows: slice) -> None:
        shards = Shards(rows.start, lambda t: exchange(rank, "max", t), lambda t: exchange(rank, "sum", t))
        results[rank] = fused(x, weight[rows], labels, 0.25, shards)

    threads = [threading.Thread(target=run, args=(rank, rows)) for rank, rows in enumerate((slice(0, 20), slice(20, 51)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (loss, dx, first), (other_loss, other_dx, second) = results
    expected = plain(x, weight, labels, 0.25)
    assert torch.equal(loss, other_loss)
    for value, wanted in zip((loss, dx + other_dx, torch.cat((first, second))), expected, strict=True):
        assert_near(value, wanted, 4e-6)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 31, 70, 2048, 5003])
def test_sums_losses_and_gradient_of_logits_equal_the_oracle(name: str, dtype: torch.dtype, columns: int) -> None:
    logits = 8 * random(6, columns, dtype=dtype)
    logits[1, columns // 2], logits[2] = -torch.inf, -torch.inf
    labels = torch.tensor([10, 9, 10 + columns, -100, 9 + columns, 10])
    wide = logits.double()
    top, total, target = reference.logit_sums(wide, labels, 10)
    with backend(name):
        sums = logit_sums(logits, labels, 10)
        losses, gradient = logit_loss_(logits.clone(), labels, 10, sums, 0.5, gradient=False), logits.clone()
        assert torch.equal(logit_loss_(gradient, labels, 10, sums, 0.5, gradient=True).nan_to_num(7), losses.nan_to_num(7))
    assert_near(sums, torch.stack((top, total, target)), 4e-6)
    assert_near(losses, (wide.logsumexp(-1) - target).where(labels != -100, 0.0), 4e-6)
    hot = torch.zeros_like(wide)
    hot[0, 0] = hot[4, -1] = hot[5, 0] = 1.0
    expected = 0.5 * (wide.softmax(-1) - hot)
    expected[3] = 0.0
    assert_near(gradient, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_is_not_hidden_but_where_no_loss_is_taken(name: str, dtype: torch.dtype, value: float) -> None:
    logits, labels = random(3, 3000, dtype=dtype), torch.tensor([5, -100, 7])
    logits[:2, 2500] = value
    with backend(name):
        sums = logit_sums(logits, labels, 0)
        losses = logit_loss_(logits, labels, 0, sums, 1.0, gradient=True)
    assert losses[0].isnan() and losses[1] == 0 and torch.isfinite(losses[2])
    assert logits[0, 2500].isnan() and (logits[1] == 0).all() and torch.isfinite(logits[2]).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_in_two_halves_is_that_of_fp32(name: str, dtype: torch.dtype) -> None:
    pairs = [(random(t, 131, dtype=dtype, seed=t), random(t, 37, dtype=dtype, seed=t + 1)) for t in (40, 7, 33)]
    with backend(name):
        total, lower = linear_dweight_split(*pairs[0])
        linear_dweight_add_split_(total, lower, *pairs[1], last=False)
        held = total.view(torch.int16).int().bitwise_left_shift(16) | (lower.int() & 0xFFFF)
        linear_dweight_add_split_(total, lower, *pairs[2], last=True)
    expected = [dy.double().T @ x.double() for dy, x in pairs]
    assert_near(held.view(torch.float32), expected[0] + expected[1], 4e-6)
    assert_near(total, sum(expected[1:], expected[0]), TOLERANCE[dtype] / 4)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("tokens", [100, 1700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_a_narrow_head_is_rounded_once_where_the_input_is_wide(
    name: str, tokens: int, dtype: torch.dtype
) -> None:
    x, labels = random(tokens, 24), labels_of(tokens, vocabulary=300)
    weight = random(300, 24, dtype=dtype).requires_grad_()
    with backend(name):
        linear_cross_entropy(x, weight, labels, 0.01).backward()
    wide = weight.detach().double().requires_grad_()
    (0.01 * F.cross_entropy(x.double() @ wide.T, labels, reduction="sum")).backward()
    assert wide.grad is not None and weight.grad is not None and weight.grad.dtype == dtype
    half_a_step = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(weight.grad.double(), wide.grad, rtol=1.001 * half_a_step, atol=1e-6)


def test_the_same_values_in_every_run() -> None:
    inputs = random(500, 64), random(300, 64), labels_of(500, vocabulary=300)
    first, second = fused(*inputs, 1.0), fused(*inputs, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_wrong_arguments_are_named() -> None:
    x, weight = random(4, 8), random(30, 8)
    with pytest.raises(ValueError, match=r"labels have shape \(3,\), expected that of x but its last dimension, \(4,\)"):
        linear_cross_entropy(x, weight, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="found the label 30, expected 0 to 29, or -100"):
        linear_cross_entropy(x, weight, torch.tensor([0, 30, 1, -100]))


def test_a_leaf_takes_its_gradient_as_it_is_and_there_is_no_second_one() -> None:
    x, weight = random(20, 8), random(30, 8).requires_grad_()
    loss = linear_cross_entropy(x, weight, labels_of(20, vocabulary=30))
    made = loss.grad_fn.found[1].data_ptr()
    loss.backward(retain_graph=True)
    assert weight.grad is not None and weight.grad.data_ptr() == made
    with pytest.raises(RuntimeError, match="a second backward pass, expected one"):
        loss.backward()


def test_a_wide_vocabulary_has_fewer_logits_at_once() -> None:
    assert [chunk_tokens(5000, v, 4) for v in (1, 8192, 49954)] == [756, 756, 378] and chunk_tokens(100, 8192, 4) == 100
    assert chunk_tokens(512, 49954, 4) == 512 and chunk_tokens(5000, 49954, 2) == 756
    assert 64 < chunk_tokens(5000, 152064, 4) < 378 and chunk_tokens(5000, 152064, 4) * 152064 * 4 <= 100 << 20
    assert chunk_tokens(5000, 10_000_000, 4) == 64 and chunk_tokens(0, 8192, 4) == 0


def test_memory_does_not_grow_with_the_tokens() -> None:
    program = """
import resource, torch
from pyalpaca.ops import linear_cross_entropy
weight = torch.randn(20000, 16, requires_grad=True)
def run(tokens):
    x = torch.randn(tokens, 16, requires_grad=True)
    linear_cross_entropy(x, weight, torch.zeros(tokens, dtype=torch.int64)).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(800)
before = run(800)
print(run(8000) - before)
"""
    command = [sys.executable, "-c", program]
    extra_kb = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert extra_kb < 8000 * 20000 * 4 / 1024 / 10, "a tenth of the logits"


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, labels = random(7, 16).requires_grad_(), random(11, 16).requires_grad_(), labels_of(7, vocabulary=11)
    expected = linear_cross_entropy(x, weight, labels).detach()
    for name in ("linear_dx", "linear_dweight"):
        monkeypatch.setattr(f"pyalpaca.ops.cross_entropy.{name}", lambda *args: pytest.fail("a gradient was made"))
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, labels), expected)
