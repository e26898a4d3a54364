"""Two models in one folder: a later reader would mix them or open the wrong one, so no writer lets it happen."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_WEIGHTS = re.compile(
    r"(pytorch_model|model)(-\d+-of-\d+)?\.(bin|safetensors)(\.index\.json)?"
    r"|consolidated\.\d+\.pth|params\.json"
    r"|release/.*\.pt|latest_checkpointed_iteration\.txt|latest"
    r"|manifest\.json"
    r"|adapter_config\.json|adapter_model\.(bin|safetensors)"
)


def refuse_mixing(out: str | Path, written: Iterable[str]) -> None:
    """ValueError if a folder holds weights or markers of any layout that would not be replaced by the files `written`."""
    folder = Path(out)
    if not folder.is_dir():
        return
    names = sorted(f.relative_to(folder).as_posix() for f in (*folder.iterdir(), *(folder / "release").rglob("*")) if f.is_file())
    stale = [name for name in names if _WEIGHTS.fullmatch(name) and name not in set(written)]
    if stale:
        raise ValueError(
            f"{folder / stale[0]}: belongs to another model and would mix with the new files; remove it or choose a new folder"
        )
