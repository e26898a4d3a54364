"""Which layers a pipeline stage holds: even, counted out, or in chunks."""

from __future__ import annotations

import pytest

from pyalpaca.model import LlamaConfig, parameters
from pyalpaca.model.sharding import chunk_parameters, stage_layers, stage_parameters

MODEL = LlamaConfig(
    vocab_size=49953, hidden_size=64, intermediate_size=96, num_layers=8, num_heads=4, num_kv_heads=4, head_dim=16, norm_eps=1e-5
)


def test_counted_layers_follow_each_other() -> None:
    assert [list(stage_layers(8, s, 2, (3, 5))) for s in range(2)] == [[0, 1, 2], [3, 4, 5, 6, 7]]
    assert [p.layer for p in stage_parameters(parameters(MODEL), 8, 1, 2, (3, 5)) if p.path.endswith("q.weight")] == [
        3,
        4,
        5,
        6,
        7,
    ]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((3, 4), "3,4 are 7 on 2 stages, expected 8 on 2"),
        ((8,), "8 are 8 on 1 stages, expected 8 on 2"),
        ((0, 8), "at least 1 each"),
    ],
)
def test_counts_that_do_not_fit_are_one_sentence(counts: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage_layers(8, 0, 2, counts)


@pytest.mark.parametrize("counts", [(), (1, 2, 3, 2)])
def test_chunks_of_all_stages_hold_every_parameter_once(counts: tuple[int, ...]) -> None:
    table = parameters(MODEL)
    held = [chunk_parameters(table, 8, stage, 2, 2, counts) for stage in range(2)]
    assert sorted(p.path for chunks in held for chunk in chunks for p in chunk) == sorted(p.path for p in table)
    assert held[0][0][0].path == "embed" and held[1][1][-1].path == "head"
    if counts:
        layers = [[sorted({p.layer for p in chunk if p.layer is not None}) for chunk in chunks] for chunks in held]
        assert layers == [[[0], [3, 4, 5]], [[1, 2], [6, 7]]]
