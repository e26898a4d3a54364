"""The machine on which pickles are read: a stack of plain values, what was stored, and an allow-list asked about every name.

There is nothing on it that imports, and nothing that calls but a Rule: a function of this house that looks at the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pyalpaca.checkpoint.container.tree import shown

_MAX_TUPLE_KEYS = 4096
"""Hashes of tuples can be made to collide, which makes a dict of many of them slow."""

_MAX_NAME = 300
"""Letters of a module or of a name that are looked at: none that is known has as many."""

_MAX_MARKS = 1000
"""Marks that are open at a time: as many as containers lie in one another, see tree.MAX_DEPTH."""

_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Protocols below 3 write these modules by their names in Python 2."""


_SIZED = (str, bytes, bytearray, list, tuple, dict, set, frozenset)


class Stream(Protocol):
    """Bytes in memory: io.BytesIO or mmap.mmap."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Inert:
    """What a pickle describes and this reader does not make: something named `name`, with the attributes that were stored."""

    name: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Rule:
    """What an allowed name gives for the arguments in the pickle: `make` raises MisfitError if they are not what it takes.

    cost: bytes of memory that one call takes beyond its arguments, about a sixth of them.
    """

    name: str
    make: Callable[[tuple[Any, ...]], Any]
    cost: int = 1


@dataclass(frozen=True)
class Refused:
    """A name that is known, and why it is not read: `reason` completes `its pickle asks for X, ...`."""

    reason: str


class UntrustedError(ValueError):
    """The pickle asks for what no file of tensors needs."""


class MisfitError(Exception):
    """Arguments that a rule does not take."""


class Machine:
    """The stack, the stacks put aside by marks, and what was stored."""

    def __init__(self, stream: Stream, find: Callable[[str], Any], persistent: Callable[[Any], Any]) -> None:
        self.stream = stream
        self.find = find
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        # Numbers are given one after the other: a list holds them in a tenth of the memory of a dict.
        self.stored: list[Any] = []
        self.stored_apart: dict[int, Any] = {}
        self.spent = 0
        self.tuple_keys = 0

    def spend(self, amount: int) -> None:
        """Refuse pickles that make much from little: a few bytes can say that a long string is to be copied again."""
        self.spent += amount
        if self.spent > 4 * self.stream.tell() + (1 << 18):
            raise UntrustedError("its pickle makes far more than it holds; don't trust this file")

    def since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def mark(self) -> None:
        if len(self.marked) > _MAX_MARKS:
            raise IndexError
        self.marked.append(self.stack)
        self.stack = []

    def store(self, number: int) -> None:
        if number == len(self.stored):
            self.stored.append(self.stack[-1])
        elif number < 0:
            raise IndexError
        elif number < len(self.stored):
            self.stored[number] = self.stack[-1]
        else:
            self.stored_apart[number] = self.stack[-1]

    def stored_at(self, number: int) -> Any:
        return self.stored[number] if 0 <= number < len(self.stored) else self.stored_apart[number]

    def make(self, value: Any, cost: int) -> None:
        self.spend(cost)
        self.stack.append(value)

    def name(self, module: Any, name: Any) -> None:
        """Push what a name of the pickle stands for."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("its pickle names something by other than words; it is damaged")
        # A long text that was stored would be copied for every name that is made of it.
        module, name = module[:_MAX_NAME], name[:_MAX_NAME]
        full = f"{_PYTHON2.get(module, module)}.{name}"
        found = self.find(full)
        if isinstance(found, Refused):
            raise UntrustedError(f"its pickle asks for `{shown(full)}`, {found.reason}")
        if found is None:
            raise UntrustedError(
                f"its pickle asks for `{shown(full)}`, expected tensors and plain values only; don't trust this file, or, if it "
                "is your own, save the state_dict alone"
            )
        self.make(found, 12)

    def call(self, function: Any, args: Any) -> None:
        """Push what a Rule gives, or an Inert record of what would have been made."""
        if not isinstance(args, tuple):
            raise IndexError
        if isinstance(function, Inert):
            self.make(Inert(function.name), 32)
            return
        if not isinstance(function, Rule):
            raise UntrustedError(f"its pickle calls a {type(function).__name__}; don't trust this file")
        copied = (len(a) if isinstance(a, (str, bytes)) else 4 * len(a) for a in args if isinstance(a, _SIZED))
        self.spend(function.cost + sum(copied))
        try:
            self.stack.append(function.make(args))
        except MisfitError:
            raise ValueError(f"its pickle uses `{function.name}` with values that do not fit; it is damaged") from None

    def add(self, kind: type, items: list[Any]) -> None:
        """Append to the list or the set on top of the stack; what an Inert one holds is dropped."""
        target = self.stack[-1]
        if isinstance(target, Inert):
            return
        if isinstance(target, kind) and isinstance(target, set):
            target.update(map(check_key, items))
        elif isinstance(target, kind) and isinstance(target, list):
            target.extend(items)
        else:
            raise IndexError

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2 or not isinstance(target, (dict, Inert)):
            raise IndexError
        if not target:
            self.spend(12)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, tuple):
                self.tuple_keys += 1
                if self.tuple_keys > _MAX_TUPLE_KEYS:
                    raise ValueError(f"its pickle has more than {_MAX_TUPLE_KEYS} keys that are tuples; this is not read")
                for part in key:
                    check_key(part)
            else:
                check_key(key)
            if isinstance(target, dict):
                target[key] = value

    def build(self) -> None:
        """Attributes: kept for an Inert record; those of an OrderedDict (a state_dict's `_metadata`) are dropped."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Inert):
            for part in state if isinstance(state, tuple) else (state,):
                if isinstance(part, dict):
                    self.spend(8 * len(part))
                    target.state.update((key, value) for key, value in part.items() if isinstance(key, str))
        elif not isinstance(target, dict) or not isinstance(state, dict):
            raise UntrustedError(f"its pickle sets attributes of a {type(target).__name__}; don't trust this file")


def check_key(key: Any) -> Any:
    """The key, if its hash is cheap and can't be made to collide; else ValueError."""
    if isinstance(key, str):
        if not key.isascii():
            try:
                key.encode()
            except UnicodeEncodeError:
                raise ValueError("its pickle has a key that is not text; it is damaged") from None
    elif isinstance(key, int):
        if not -(1 << 64) < key < 1 << 64:
            raise ValueError("its pickle has a number of more than 64 bits as a key; it is damaged")
    elif not isinstance(key, (bytes, float, Inert)) and key is not None:
        raise ValueError(f"its pickle has a {type(key).__name__} as a key, expected names or numbers; it is damaged")
    return key
