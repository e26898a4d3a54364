"""Pipeline schedules, played by the simulator."""

from __future__ import annotations

from collections import Counter

import pytest

from pyalpaca.parallel.schedule import SCHEDULES, Action, interleaved, one_f_one_b, pipeline_schedule, simulate, zb_h1

SIZES = [(2, 2), (2, 8), (4, 4), (4, 8), (4, 12), (8, 16)]


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (1, 4), (2, 1), (2, 8), (4, 2), (4, 8), (8, 3)])
def test_1f1b_runs_every_micro_batch_once_and_never_deadlocks(stages: int, micro_batches: int) -> None:
    schedules = [one_f_one_b(s, stages, micro_batches) for s in range(stages)]
    for actions in schedules:
        for kind in ("forward", "backward"):
            assert [a.micro_batch for a in actions if a.kind == kind] == list(range(micro_batches))
    result = simulate(schedules)
    # Narayanan et al. 2021: the pipeline fills and drains once, p - 1 slots of m + p - 1.
    assert result.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))
    assert result.in_flight == [min(stages - s, micro_batches) for s in range(stages)]


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_interleaving_divides_the_bubble_by_the_virtual_stages(stages: int, micro_batches: int, chunks: int) -> None:
    schedules = [interleaved(s, stages, micro_batches, chunks) for s in range(stages)]
    once = Counter((i, c) for i in range(micro_batches) for c in range(chunks))
    for actions in schedules:
        for kind in ("forward", "backward"):
            assert Counter((a.micro_batch, a.chunk) for a in actions if a.kind == kind) == once
    result = simulate(schedules)
    # Narayanan et al. 2021: the same p - 1 slots, each a chunk long, beside m v of work.
    assert result.bubble == pytest.approx((stages - 1) / (micro_batches * chunks + stages - 1))
    warmups = [(stages - s - 1) * 2 + (chunks - 1) * stages for s in range(stages)]
    assert result.in_flight == [min(w + 1, micro_batches * chunks) for w in warmups]


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_zero_bubble_has_a_third_of_the_bubble_in_the_memory_of_1f1b(stages: int, micro_batches: int) -> None:
    schedules = [zb_h1(s, stages, micro_batches) for s in range(stages)]
    for actions in schedules:
        for kind in ("forward", "input", "weight"):
            assert [a.micro_batch for a in actions if a.kind == kind] == list(range(micro_batches))
    result, plain = simulate(schedules), simulate([one_f_one_b(s, stages, micro_batches) for s in range(stages)])
    # Qi et al. 2023, table 2: (p - 1)(F + B - W) idle beside m (F + B + W), and all three cost the same here.
    assert result.bubble == pytest.approx((stages - 1) / (3 * micro_batches + stages - 1))
    assert result.bubble < plain.bubble and result.makespan < plain.makespan
    assert max(result.in_flight) == max(plain.in_flight)


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_fewer_micro_batches_than_stages_still_run(name: str) -> None:
    assert simulate([pipeline_schedule(name, s, 4, 2) for s in range(4)]).makespan > 0


def test_a_schedule_has_the_actions_of_its_name() -> None:
    assert pipeline_schedule("1f1b", 0, 2, 4) == one_f_one_b(0, 2, 4)
    assert pipeline_schedule("interleaved", 1, 2, 4, 2) == interleaved(1, 2, 4, 2)
    assert pipeline_schedule("zb-h1", 1, 2, 4) == zb_h1(1, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("interleaved", 0, 2, 3, 2), "3 micro-batches can't be interleaved over 2 pipeline stages; .* multiple of 2"),
        (("interleaved", 0, 2, 4, 1), "interleaved wants 2 or more"),
        (("1f1b", 0, 2, 4, 2), "the others 1"),
        (("zb-h1", 0, 1, 4), "there is 1 stage"),
        (("gpipe", 0, 2, 4), f"choose one of {', '.join(SCHEDULES)}"),
    ],
)
def test_what_a_schedule_can_not_do_is_one_sentence(arguments: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline_schedule(*arguments)


@pytest.mark.parametrize(
    "actions",
    [
        [Action("backward", 0), Action("forward", 0)],
        [Action("forward", 0), Action("weight", 0), Action("input", 0)],
    ],
)
def test_a_schedule_that_waits_for_itself_is_named(actions: list[Action]) -> None:
    with pytest.raises(ValueError, match="deadlocks"):
        simulate([actions])
