"""Pipeline schedules, played by the simulator."""

from __future__ import annotations

import pytest

from pyalpaca.parallel import Action, one_f_one_b, simulate


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


def test_a_schedule_that_waits_for_itself_is_named() -> None:
    backward_first = [Action("backward", 0), Action("forward", 0)]
    with pytest.raises(ValueError, match="deadlocks"):
        simulate([backward_first])
