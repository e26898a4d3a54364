"""A value that a file describes, as a tree: of finite depth, without cycles, and no larger to walk through than to store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAX_DEPTH = 100
"""Levels of containers in containers: functions may walk through what was read by calling themselves."""

_MORE = 10
"""How many times more there may be to walk through than is stored: containers may be shared, but not a thousand times over."""

_ENDLESS = 10**15
"""Weights are not counted further: they can grow with every value to twice as much."""


def shown(text: str) -> str:
    """Text of a file that may be damaged or hostile, fit for a sentence: on one line, printable, not long."""
    text = text if len(text) <= 120 else f"{text[:100]}... ({len(text):,} characters)"
    if text.isprintable():
        return text
    escaped = ascii(text)[1:-1]  # up to ten times as long
    return escaped if len(escaped) <= 300 else f"{escaped[:280]}..."


def check_tree(root: Any, inside: Callable[[Any], Any]) -> None:
    """ValueError if `root`, of dicts, lists and tuples, is endless, deeper than MAX_DEPTH, or grows when it is walked through.

    inside: gives the container in a value of another type, or None. No recursion, and each container is looked at once.
    """
    weights: dict[int, tuple[int, int]] = {}  # id of a finished container: (values to walk through, depth)
    open_: set[int] = set()
    stored = 0
    todo: list[tuple[Any, bool]] = [(root, False)]
    while todo:
        value, children_are_done = todo.pop()
        if id(value) in weights:
            continue
        children = _children(value, inside)
        if children_are_done:
            open_.discard(id(value))
            parts = [weights[id(child)] for child in children if id(child) in weights]
            depth = 1 + max((depth for _, depth in parts), default=0)
            if depth > MAX_DEPTH:
                raise ValueError(f"has more than {MAX_DEPTH} levels of containers in containers; don't trust this file")
            weights[id(value)] = (min(1 + len(children) + sum(weight for weight, _ in parts), _ENDLESS), depth)
            stored += 1 + len(children)
        elif id(value) in open_:
            raise ValueError("has a container that contains itself; don't trust this file")
        else:
            open_.add(id(value))
            todo.append((value, True))
            todo.extend((child, False) for child in children if _is_container(child, inside))
    weight, _ = weights[id(root)]
    if weight > _MORE * stored + 10_000:
        raise ValueError(f"has {stored:,} values that refer to each other as if they were {weight:,}; don't trust this file")


def _is_container(value: Any, inside: Callable[[Any], Any]) -> bool:
    return isinstance(value, (dict, list, tuple)) or inside(value) is not None


def _children(value: Any, inside: Callable[[Any], Any]) -> list[Any] | tuple[Any, ...]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return value
    held = inside(value)
    return () if held is None else (held,)
