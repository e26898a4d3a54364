"""`pyalpaca bench train`: all contestants train the same model on the same tokens."""

from __future__ import annotations

import json

import pytest

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


@pytest.mark.parametrize(
    "flags", [["--contestants", "nobody"], ["--rounds", "0"], ["--steps", "0"]], ids=lambda flags: " ".join(flags)
)
def test_what_can_not_be_measured_is_refused(flags: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{flags[0]} {flags[1]}"):
        main(["bench", "train", *flags])
