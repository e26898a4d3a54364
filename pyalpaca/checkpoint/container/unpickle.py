"""Pickles are read here without running anything: the machine's instructions, and the loop that follows them.

A pickle is a program for a stack machine. `pickletools` decodes its instructions; what they do is written here. A name in the
pickle is looked up in a table of ours; what the pickle then "calls" is the table's Rule. Objects of training programs that lie
beside the tensors (arguments, random states, enums) become `Inert` records. Any other name is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

from pyalpaca.checkpoint.container.pickle_machine import Inert, Machine, Stream, UntrustedError, check_key
from pyalpaca.checkpoint.container.tree import check_tree

MAX_PICKLE = 1 << 26
"""Bytes of the longest pickle that is read. The pickle of a 7B model has 34 kB; tensors lie outside of it."""


def _text(value: str) -> str | bytes:
    """A byte string of Python 2: text if it is UTF-8. `pickletools` gives it as Latin-1."""
    raw = value.encode("latin-1")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _two_lines(stream: Stream) -> tuple[str, str]:
    """A module and a name. `pickletools` would take backslashes in them for escapes."""
    lines = stream.readline(), stream.readline()
    if not all(line.endswith(b"\n") for line in lines):
        raise ValueError
    return lines[0][:-1].decode(), lines[1][:-1].decode()


def _proto(machine: Machine, version: int) -> None:
    if version > 5:
        raise ValueError(f"its pickle has protocol {version}, expected 0 to 5; it is damaged or of a newer Python")


def _tuple_of(count: int) -> Callable[[Machine, Any], None]:
    def step(machine: Machine, _: Any) -> None:
        if len(machine.stack) < count:
            raise IndexError
        items = tuple(machine.stack[len(machine.stack) - count :])
        del machine.stack[len(machine.stack) - count :]
        machine.make(items, 8)

    return step


def _dict_since_mark(machine: Machine, _: Any) -> None:
    items = machine.since_mark()
    machine.make({}, 12)
    machine.set_items(items)


def _call_top(machine: Machine, _: Any) -> None:
    args = machine.stack.pop()
    machine.call(machine.stack.pop(), args)


def _call_with_keywords(machine: Machine, _: Any) -> None:
    keywords, args, function = machine.stack.pop(), machine.stack.pop(), machine.stack.pop()
    if not isinstance(keywords, dict):
        raise IndexError
    if keywords and not isinstance(function, Inert):
        raise UntrustedError("its pickle makes a plain value by keywords; don't trust this file")
    machine.call(function, args)


def _call_since_mark(machine: Machine, _: Any) -> None:
    function, *args = machine.since_mark() or [None]
    machine.call(function, tuple(args))


def _call_named(machine: Machine, name: tuple[str, str]) -> None:
    args = tuple(machine.since_mark())
    machine.name(*name)
    machine.call(machine.stack.pop(), args)


def _name_top(machine: Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.name(module, name)


def _set_item(machine: Machine, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _pop(machine: Machine, _: Any) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.since_mark()


def _pop_mark(machine: Machine, _: Any) -> None:
    machine.since_mark()


def _push(machine: Machine, value: Any) -> None:
    machine.stack.append(value)


def _constant(value: Any) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.stack.append(value)


_PUSHED = [
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
]

# Not here, and so refused: EXT1, EXT2 and EXT4 (names by number), PERSID (a storage as text), STRING (text of Python 2, escaped),
# NEXT_BUFFER and READONLY_BUFFER (data outside the pickle). torch.save writes none of them.
_BY_NAME: dict[str, Callable[[Machine, Any], None]] = {
    **dict.fromkeys(_PUSHED, _push),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), lambda m, value: m.stack.append(_text(value))),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda m, number: m.store(number)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, number: m.stack.append(m.stored_at(number))),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _call_top),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_TUPLE": _constant(()),
    "EMPTY_LIST": lambda m, _: m.make([], 12),
    "EMPTY_DICT": lambda m, _: m.make({}, 12),
    "EMPTY_SET": lambda m, _: m.make(set(), 32),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": lambda m, _: m.make(tuple(m.since_mark()), 8),
    "LIST": lambda m, _: m.make(m.since_mark(), 12),
    "DICT": _dict_since_mark,
    "FROZENSET": lambda m, _: m.make(frozenset(map(check_key, m.since_mark())), 32),
    "MARK": lambda m, _: m.mark(),
    "POP": _pop,
    "POP_MARK": _pop_mark,
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "MEMOIZE": lambda m, _: m.store(len(m.stored) + len(m.stored_apart)),
    "APPEND": lambda m, _: m.add(list, [m.stack.pop()]),
    "APPENDS": lambda m, _: m.add(list, m.since_mark()),
    "ADDITEMS": lambda m, _: m.add(set, m.since_mark()),
    "SETITEM": _set_item,
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "GLOBAL": lambda m, name: m.name(*name),
    "STACK_GLOBAL": _name_top,
    "INST": _call_named,
    "OBJ": _call_since_mark,
    "NEWOBJ_EX": _call_with_keywords,
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.stack.append(m.persistent(m.stack.pop())),
    "PROTO": _proto,
    "FRAME": lambda m, _: None,
}
_STEPS: dict[bytes, Any] = {
    op.code.encode("latin-1"): (_two_lines if op.name in ("GLOBAL", "INST") else op.arg and op.arg.reader, _BY_NAME[op.name])
    for op in pickletools.opcodes
    if op.name in _BY_NAME
}


def no_storages(_: Any) -> Any:
    """What to make of a persistent id where there are none."""
    raise ValueError("its pickle refers to storages where there are none; it is damaged")


def unpickle(stream: Stream, find: Callable[[str], Any], persistent: Callable[[Any], Any] = no_storages) -> Any:
    """The value of the pickle at the stream's place, which is left behind it; nothing the pickle names is imported or called.

    stream: bytes in memory, at most MAX_PICKLE of them (BytesIO, or a mmap): what the pickle says of lengths is bounded by it.
    find: what `module.name` stands for: a Rule, a Refused, a value, or None. persistent: gives the value of a persistent id.
    The value is a tree of finite depth, without cycles. ValueError, to be put after the file's name, says what is wrong.
    """
    machine = Machine(stream, find, persistent)
    while (code := stream.read(1)) != b".":
        if not code:
            raise ValueError(f"its pickle ends after {stream.tell():,} bytes without an end; the file is cut off or damaged")
        place = stream.tell() - 1
        reader, step = _STEPS.get(code, (None, None))
        if step is None:
            raise ValueError(f"its pickle has {code!r} at byte {place:,}, which torch.save does not write; it is damaged")
        try:
            argument = reader(stream) if reader else None
        except ValueError:  # its message may quote the whole file
            raise ValueError(f"its pickle can't be read at byte {place:,}; the file is cut off or damaged") from None
        try:
            step(machine, argument)
        except (IndexError, KeyError):  # the stack is too short, or nothing was stored under this number
            raise ValueError(f"its pickle makes no sense at byte {place:,}; it is damaged") from None
    if len(machine.stack) != 1 or machine.marked:
        raise ValueError("its pickle ends with more or less than one value; it is damaged")
    check_tree(machine.stack[0], lambda value: value.state if isinstance(value, Inert) else None)
    return machine.stack[0]
