"""No C++ operator is slower than the same formula in plain torch."""

from __future__ import annotations

import pytest
import torch
from ops_cases import DTYPES, backends_here
from speed import measure


@pytest.mark.long
@pytest.mark.skipif("cpp" not in backends_here(), reason="the extension is not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", ["rms_norm", "rope", "flash_attention"])
def test_no_operator_is_slower_than_plain_torch(operator: str, dtype: torch.dtype) -> None:
    slow = [row for row in measure([operator], [dtype], seconds=0.5) if row["vs"]["eager"] < 0.9]
    assert not slow
