"""Loading pyalpaca._C, or one sentence that says why it can't be loaded."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

_BUILD_INFO = Path(__file__).parents[1] / "_C.build.json"
_REBUILD = "install pyalpaca again (`pip install .` in its source folder)"


def minor(version: str) -> str:
    """'2.13' of '2.13.0+cpu'."""
    return ".".join(version.split("+")[0].split(".")[:2])


def build_info() -> dict[str, str] | None:
    """What the extension was built with ({"torch", "compiler"}), or None if it was not built."""
    if not _BUILD_INFO.exists():
        return None
    info: dict[str, str] = json.loads(_BUILD_INFO.read_text(encoding="utf-8"))
    return info


@functools.cache
def problem() -> str | None:
    """Load pyalpaca._C, which registers torch.ops.pyalpaca.*; None if that went well, else one sentence saying why not.

    The version of torch is compared before loading: C++ symbols change between its minor versions, and the loader's own
    message (an undefined mangled symbol) tells nobody what to do.
    """
    info = build_info()
    if info is None or importlib.util.find_spec("pyalpaca._C") is None:
        return f"the extension pyalpaca._C is not built for this Python; {_REBUILD}"
    if minor(info["torch"]) != minor(torch.__version__):
        return (
            f"the extension pyalpaca._C was built with torch {info['torch']}, but torch {torch.__version__} is installed, "
            f"expected {minor(info['torch'])}.*; {_REBUILD}, or install torch {minor(info['torch'])}"
        )
    try:
        module()
    except ImportError as error:
        return f"the extension pyalpaca._C does not load ({error}); {_REBUILD}"
    return None


def module() -> Any:
    """The pybind11 module pyalpaca._C itself; ImportError if it does not load."""
    return importlib.import_module("pyalpaca._C")
