"""One tiny model and data set for all runs of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_makers import make_road


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train-road")
    make_road(folder)
    return folder
