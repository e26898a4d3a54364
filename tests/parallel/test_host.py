"""What processes tell each other beside the steps: who is there after a restart, and where a thread is."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from launch import launch

import pyalpaca
from pyalpaca.parallel import PeerLostError, Watch, agree, host_group, init_mesh, tell
from pyalpaca.parallel.host import meet
from pyalpaca.parallel.watch import is_lost_connection, place


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))


def test_processes_meet_under_a_name_that_no_attempt_before_has_had(store: dist.TCPStore) -> None:
    names = []
    for _ in range(3):  # each finds what the attempt before has left
        with ThreadPoolExecutor(4) as pool:
            names.append(set(pool.map(lambda rank: meet(store, rank, 4, 10), range(4))))
    assert [len(name) for name in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


@pytest.mark.parametrize("late", [0, 1])
def test_those_who_come_early_do_not_take_a_dead_process_for_the_late_one(store: dist.TCPStore, late: int) -> None:
    with ThreadPoolExecutor(3) as pool:
        before = set(pool.map(lambda rank: meet(store, rank, 3, 10), range(3)))
        early = [pool.submit(meet, store, rank, 3, 10) for rank in range(3) if rank != late]
        time.sleep(0.3)
        assert not any(future.done() for future in early)
        name = meet(store, late, 3, 10)
        assert {future.result() for future in early} == {name} != before


def test_a_process_that_never_comes_is_not_waited_for_longer_than_the_time_out(store: dist.TCPStore) -> None:
    with pytest.raises(RuntimeError, match="rank 0: timed out, not all of the 2 processes have started") as error:
        meet(store, 0, 2, 0.1)
    assert is_lost_connection(error.value)


def test_alone_everything_is_agreed() -> None:
    assert host_group() is None
    assert agree([3, -3], None) == [3, -3]
    assert tell("word", None) == ["word"]
    with pytest.raises(RuntimeError, match="timed out"), Watch(None, 1):
        raise RuntimeError("timed out")


def conversation() -> tuple[list[int], list[str]]:
    rank = init_mesh(tp=2).rank
    group = host_group(1)
    return agree([rank, -rank, 7], group), tell(f"I am {rank}", group)


def test_processes_hear_the_largest_numbers_and_all_words() -> None:
    assert launch(2, conversation) == [([1, 0, 7], ["I am 0", "I am 1"])] * 2


def lose_one() -> str:
    """Rank 1 leaves a context by an error while rank 0 waits for it; what each has to say."""
    rank = init_mesh(tp=2, timeout_minutes=0.05).rank
    group = host_group(0.05)
    try:
        with Watch(group, 5) as watch:
            watch.begin_step(6)
            if rank == 1:
                raise ValueError("not with me")
            agree([0], group)
    except (ValueError, PeerLostError) as error:
        if rank == 1:
            time.sleep(6)  # its connections stay open, so that only time tells
        return str(error)
    return "nothing"


def test_a_rank_that_has_left_is_named_with_its_reason() -> None:
    first, second = launch(2, lose_one)
    assert second == "not with me"
    assert first.startswith("step 6: rank 0 failed in agree (")
    assert first.endswith("): rank 1 stopped at step 6 (ValueError: not with me); go on with --resume")


def test_a_place_is_the_innermost_of_our_own_and_what_it_waits_in() -> None:
    root = pyalpaca.__path__[0]

    def frame(file: str, line: int, name: str) -> traceback.FrameSummary:
        return traceback.FrameSummary(file, line, name, line="", lookup_line=False)

    inner = [
        frame("/x/torch/distributed/distributed_c10d.py", 9, "all_reduce"),
        frame("/x/torch/distributed/log.py", 3, "wrapper"),
    ]
    ours = [frame(f"{root}/parallel/collectives.py", 20, "all_reduce"), frame(f"{root}/train/step.py", 80, "gradients")]
    assert place([*inner, *ours]) == ("all_reduce (train/step.py:80)", True)
    assert place(ours[1:]) == ("gradients (train/step.py:80)", False)
    assert place([frame("/x/numpy/core.py", 1, "dot"), ours[1]]) == ("gradients (train/step.py:80)", False)
    assert place([frame("/x/mine.py", 1, "main")]) == ("main (mine.py:1)", False)
    assert place([]) == ("nothing", False)


def test_a_thread_that_waits_for_another_is_seen_to_wait() -> None:
    assert not place(traceback.StackSummary.extract(traceback.walk_stack(None)))[1]
    done = threading.Event()
    work = threading.Thread(target=lambda: done.wait(5))
    joins = threading.Thread(target=work.join)
    for thread in (work, joins):
        thread.start()
    time.sleep(0.1)
    for thread, word in ((work, "wait"), (joins, "join")):
        frame = sys._current_frames()[thread.ident or 0]
        where, waits = place(traceback.StackSummary.extract(traceback.walk_stack(frame)))
        assert where.startswith(f"{word} (") and waits
    done.set()
    joins.join()
