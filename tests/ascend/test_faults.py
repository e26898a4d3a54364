"""Each fault that a device would not name is named by the emulation, whatever the order of the pipes; mended, nothing is."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from emulation import AIC_ONLY, AIV_ONLY, MIX_AIC_1_2, MIX_AIV_1_0, FaultError, Output, build_library, launch

SEEDS = [*range(9), *range(20, 26)]
# name of the fault, kind of launch, cores
ONE = {
    "memory-limit": ["too_much_unified_memory"],
    "misaligned": ["misaligned_vector", "misaligned_copy"],
    "partial-block": ["count_of_part_of_a_block"],
    "argument": ["mask_too_large", "repeat_too_large", "stride_too_large", "a_reserved_event"],
    "overlap": ["overlap_in_part", "overlap_between_repeats"],
    "uninitialised": ["never_written", "padding_is_not_data", "scratch_is_not_a_result"],
    "use-after-free": ["used_after_it_was_freed", "freed_twice"],
    "queue": ["taken_from_an_empty_queue", "more_taken_than_there_are", "queue_too_short"],
    "leaked-buffer": ["never_freed", "left_in_the_queue"],
    "position": ["filled_an_output_queue", "memory_of_the_other_kind_of_core"],
    "out-of-bounds": ["read_past_global_memory", "read_past_the_declared_size", "past_the_local_tensor"],
    "read-only": ["wrote_an_input"],
    "flag-unpaired": ["waited_for_what_was_not_set"],
    "flag-set-twice": ["set_twice"],
    "flag-left-set": ["left_set"],
    "event-ids": ["an_event_released_twice"],
    "kernel-type": ["another_kernel_type"],
    "race": [
        "no_flag_before_computing",
        "no_flag_before_copying_out",
        "no_flag_before_the_scalar_reads",
        "buffer_filled_again_too_early",
        "two_copies_to_one_place",
    ],
    "scalar-cache": ["scalar_write_not_cleaned", "scalar_read_of_an_old_line"],
    "assertion": ["an_assertion"],
}
CASES = [(kernel, fault, AIV_ONLY, 1) for fault, kernels in ONE.items() for kernel in kernels] + [
    ("too_much_l0a", "memory-limit", AIC_ONLY, 1),
    ("too_much_l1", "memory-limit", AIC_ONLY, 1),
    ("two_cores_write_the_same", "write-conflict", AIV_ONLY, 2),
    ("two_cores_add_without_atomics", "write-conflict", AIV_ONLY, 2),
    ("one_core_reads_what_another_writes", "race|uninitialised", MIX_AIV_1_0, 2),
    ("one_core_does_not_arrive", "deadlock", MIX_AIV_1_0, 2),
    ("counted_past_15", "flag-counter", MIX_AIV_1_0, 2),
    ("cross_flag_left_set", "flag-left-set", MIX_AIV_1_0, 2),
    ("a_reserved_cross_flag", "argument", MIX_AIV_1_0, 2),
    ("factors_not_waited_for", "race|uninitialised", AIC_ONLY, 1),
    ("product_not_waited_for", "race", AIC_ONLY, 1),
    ("short_products_without_a_barrier", "race", AIC_ONLY, 1),
    ("product_between_its_places", "misaligned", AIC_ONLY, 1),
    ("a_single_row", "argument", AIC_ONLY, 1),
    ("an_event_of_the_pipe", "argument", AIC_ONLY, 1),
    ("read_before_the_cube_core_wrote", "race|uninitialised", MIX_AIC_1_2, 1),
    ("columns_that_were_never_computed", "uninitialised", MIX_AIC_1_2, 1),
]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build_library([Path(__file__).with_name("faults.cpp")], ["-O0"])


def run(library: ctypes.CDLL, kernel: str, mended: int, seed: int, kind: int, cores: int) -> dict[str, torch.Tensor]:
    x = torch.arange(1024, dtype=torch.float32)
    outputs = {"a": x, "b": Output((1024,), torch.float32, part=True), "mended": mended}
    return launch(library, kernel, cores, outputs, seed, kind, ("a",) if kernel == "two_cores_add_without_atomics" else ())


@pytest.mark.parametrize(("kernel", "fault", "kind", "cores"), CASES, ids=[case[0] for case in CASES])
def test_the_fault_is_named_and_the_mended_kernel_runs(
    library: ctypes.CDLL, kernel: str, fault: str, kind: int, cores: int
) -> None:
    for seed in SEEDS:
        with pytest.raises(FaultError) as caught:
            run(library, kernel, 0, seed, kind, cores)
        assert caught.value.name in fault.split("|"), caught.value
        run(library, kernel, 1, seed, kind, cores)


def test_a_fault_says_where(library: ctypes.CDLL) -> None:
    with pytest.raises(FaultError) as caught:
        run(library, "past_the_local_tensor", 0, 0, AIV_ONLY, 1)
    line = 1 + next(
        i for i, text in enumerate(Path(__file__).with_name("faults.cpp").read_text().splitlines()) if "kCount + 8" in text
    )
    assert str(caught.value) == (
        f"out-of-bounds: faults.cpp:{line}: Adds on core 0 (AIV), pipe V: UB[1024, 2080) goes past the tensor's end at 2048"
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sound_kernel_gives_the_same_in_any_order(library: ctypes.CDLL, seed: int) -> None:
    out = run(library, "sound", 1, seed, AIV_ONLY, 1)["b"]
    assert torch.equal(out, 2 * torch.arange(1024, dtype=torch.float32))


def test_an_output_that_is_not_written_whole_is_a_fault(library: ctypes.CDLL) -> None:
    with pytest.raises(FaultError, match="3072 bytes of b were never written"):
        launch(library, "no_flag_before_computing", 1, {"a": torch.zeros(1024), "b": Output((1024,), torch.float32), "mended": 1})
