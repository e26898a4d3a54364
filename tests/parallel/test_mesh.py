"""The mesh: ranks on axes, and worlds that don't fit."""

from __future__ import annotations

import pytest
import torch

from pyalpaca.parallel import Mesh, init_mesh


def test_tensor_ranks_are_neighbours_and_pipeline_stages_farthest_apart() -> None:
    mesh = Mesh(torch.device("cpu"), tp=2, dp=2, pp=2, rank=6)
    assert (mesh.tp_rank, mesh.dp_rank, mesh.pp_rank) == (0, 1, 1)
    assert mesh.last_stage and not mesh.first_stage
    assert mesh.stage_neighbour(-1) == 2


def test_a_world_that_does_not_fit_says_what_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 4"):
        init_mesh(tp=2, pp=2)
