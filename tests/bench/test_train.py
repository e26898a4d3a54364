"""`pyalpaca bench train`: all contestants train the same model on the same tokens."""

from __future__ import annotations

import json

import pytest

from pyalpaca.bench.train.cases import Scale
from pyalpaca.bench.train.measure import step_flops
from pyalpaca.bench.train.run import page
from pyalpaca.cli import main


def test_contestants_have_the_same_losses(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("ours", "transformers", "one", "tp2")
    assert main(["bench", "train", "--scale", "tiny", "--steps", "1", "--rounds", "1", "--contestants", ",".join(names)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    losses = {row["name"].split("/")[0]: row["losses"] for row in result["rows"]}
    assert losses["transformers"] == pytest.approx(losses["ours"], rel=1e-5)
    assert losses["tp2"] == pytest.approx(losses["one"], rel=1e-5)
    assert set(result["geomean"]) == {"transformers", "tp2"}
    assert all(row["peak_bytes"] >= row["own_bytes"] > 0 for row in result["rows"])
    text = page(result)
    assert all(f"| {name} |" in text for name in names)


def test_operations_are_six_for_each_weight_and_token_beside_attention() -> None:
    scale = Scale("one", hidden_size=8, num_layers=1, num_heads=1, intermediate_size=16, vocab_size=32, seq_length=1, batch=1)
    weights, attention = 4 * 8 * 8 + 3 * 8 * 16 + 32 * 8, 2 * 2 * 8  # scores and mixed values, of one key
    assert step_flops(scale, 1) == 6 * weights + 3 * attention


@pytest.mark.parametrize(
    "flags", [["--contestants", "nobody"], ["--rounds", "0"], ["--steps", "0"]], ids=lambda flags: " ".join(flags)
)
def test_what_can_not_be_measured_is_refused(flags: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{flags[0]} {flags[1]}"):
        main(["bench", "train", *flags])
