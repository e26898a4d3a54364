"""Pickles are read without running anything, give what Python's own reader gives, and can't be made to take time or memory."""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import random
import struct
import sys
import time
import tracemalloc
import types
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_makers import Call, Name, Storage, pickled, steps, tensor

from pyalpaca.checkpoint.container.pickle_machine import Inert
from pyalpaca.checkpoint.container.plain_names import plain_names
from pyalpaca.checkpoint.container.torch_names import storage_ref, torch_names
from pyalpaca.checkpoint.container.unpickle import unpickle


def read(content: bytes) -> Any:
    """The value of a pickle, with every tensor made as an empty one."""
    stream = io.BytesIO(content)
    value = unpickle(stream, torch_names(lambda *_: torch.empty(0)), storage_ref)
    assert stream.read() == b""
    return value


KEYS = st.one_of(st.text(max_size=5), st.integers(-(2**63), 2**63), st.booleans(), st.none(), st.binary(max_size=5))
SCALARS = st.one_of(KEYS, st.integers(), st.floats(allow_nan=False), st.complex_numbers(allow_nan=False), st.binary(max_size=300))
VALUES = st.recursive(
    st.one_of(SCALARS, st.sets(KEYS, max_size=4), st.frozensets(KEYS, max_size=4), st.builds(bytearray, st.binary(max_size=9))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS | st.tuples(st.text(max_size=3), st.integers(0, 9)), inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4).map(collections.OrderedDict),
    ),
    max_leaves=12,
)


def kinds(value: Any) -> Any:
    """The types in a value; an OrderedDict may come out as a dict."""
    if isinstance(value, dict):
        return [(kinds(key), kinds(item)) for key, item in value.items()]
    return type(value), [kinds(item) for item in value] if isinstance(value, (list, tuple)) else None


@given(value=VALUES, protocol=st.integers(0, 5))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_plain_values_come_out_as_python_reads_them(value: Any, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    assert read(content) == pickle.loads(content)
    assert kinds(read(content)) == kinds(value)


def test_shared_values_stay_shared() -> None:
    shared: list[int] = [1]
    first, second = read(pickle.dumps({"a": shared, "b": shared}))["a"], read(pickle.dumps([shared, shared]))[1]
    assert first == second == [1]
    both = read(pickle.dumps([shared, shared]))
    assert both[0] is both[1]


def test_the_dicts_of_python_2_are_read() -> None:
    """Its OrderedDict gives its content as a list of pairs, and its text is bytes."""
    pairs = b"]((U\x01aK\x01l(U\x02\xc3\xa9K\x02le".replace(b"l(", b"t(").replace(b"le", b"te")
    assert read(b"\x80\x02ccollections\nOrderedDict\n" + pairs + b"\x85R.") == {"a": 1, "é": 2}
    assert read(b"\x80\x02U\x02\xff\xfe.") == b"\xff\xfe"


def test_other_kinds_of_dicts_and_sizes_are_plain() -> None:
    value = {"a": collections.defaultdict(list, x=1), "b": collections.Counter("aab"), "c": torch.Size([2, 3])}
    assert read(pickle.dumps(value, 2)) == {"a": {"x": 1}, "b": {"a": 2, "b": 1}, "c": (2, 3)}


def test_types_of_torch_are_themselves() -> None:
    kinds = [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint16]
    assert read(pickle.dumps(kinds, 2)) == kinds


class Mode(Enum):
    fast = 1

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return type(self), (self.value,)  # Python 3.11.0 to 3.11.4 write an attribute instead, see below


@pytest.mark.parametrize("protocol", [1, 2, 4, 5])
def test_objects_of_a_training_program_are_inert(protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = [types.ModuleType(name) for name in ("megatron", "megatron.core", "megatron.core.enums")]
    packages[-1].Mode = Mode  # type: ignore[attr-defined]
    monkeypatch.setattr(Mode, "__module__", packages[-1].__name__)
    for package in packages:
        monkeypatch.setitem(sys.modules, package.__name__, package)
    args = argparse.Namespace(hidden_size=64, mode=Mode.fast, dtype=torch.float16, out=Path("x"), device=torch.device("cpu"))
    rng = {"np": np.random.get_state(), "python": random.getstate(), "loss": np.float32(1.5)}
    content = pickle.dumps({"args": args, "rng": rng, "iteration": 7}, protocol)
    for package in packages:
        monkeypatch.delitem(sys.modules, package.__name__)

    value = read(content)
    assert value["iteration"] == 7
    found = value["args"]
    assert isinstance(found, Inert)
    assert found.name == "argparse.Namespace"
    assert found.state["hidden_size"] == 64
    assert found.state["dtype"] == torch.float16
    assert {key: found.state[key].name for key in ("mode", "device")} == {
        "mode": "megatron.core.enums.Mode",
        "device": "torch.device",
    }
    assert value["rng"]["np"][1].name == "numpy.ndarray"
    assert value["rng"]["loss"].name == "numpy.generic"
    assert value["rng"]["python"] == random.getstate()


def test_an_enum_written_as_an_attribute_is_inert() -> None:
    content = pickled(Call(Name("builtins", "getattr"), (Name("megatron.core.enums", "ModelType"), "encoder_or_decoder")))
    assert read(content).name == "megatron.core.enums.ModelType.encoder_or_decoder"


def test_inert_records_of_two_files_share_nothing() -> None:
    array = Name("numpy.core.multiarray", "_reconstruct")
    read(b"\x80\x02" + steps(array) + steps({"trap": 1}) + b"b.")
    assert read(pickled(array)).state == {}


# What an attacker would have run.

NAMES = """
os.system posix.system nt.system subprocess.Popen subprocess.check_output builtins.eval builtins.exec builtins.compile
builtins.__import__ builtins.open builtins.print __builtin__.eval importlib.import_module runpy.run_path marshal.loads
pickle.loads _pickle.loads _pickle.Unpickler copyreg.__newobj__ copyreg.add_extension operator.attrgetter
operator.methodcaller functools.partial types.FunctionType types.CodeType ctypes.CDLL shutil.rmtree webbrowser.open
pip.main pdb.run timeit.timeit code.interact asyncio.run torch.load torch.hub.load torch.jit.load
torch.storage._load_from_bytes torch.serialization.load torch.utils.cpp_extension.load torch.nn.modules.linear.Linear
torch.distributed.rpc.rpc_sync torch._dynamo.optimize numpy.load numpy.fromfile numpy.testing._private.utils.runstring
collections.namedtuple collections.OrderedDict.__init__ builtins.set.__class__ argparse.ArgumentParser
torch.Tensor.apply_ torch.device.__class__ transformers.AutoModel __main__.Model
"""


def named(name: str) -> Name:
    return Name(*name.rsplit(".", 1)) if not name.count(".__") else Name(*name.split(".", 1))


def unicode(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


@pytest.mark.parametrize("name", NAMES.split())
def test_a_name_that_no_tensor_needs_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is written, called, or only mentioned."""
    monkeypatch.chdir(tmp_path)
    wanted = named(name)
    command = unicode("touch ran")
    by_stack = unicode(wanted.module) + unicode(wanted.name) + b"\x93"
    for content in (
        pickled(wanted),
        pickled({"weight": Call(wanted, ("touch ran",))}),
        b"\x80\x04" + by_stack + command + b"\x85R.",
        b"\x80\x02" + steps(wanted) + b")\x81.",
        b"\x80\x04" + by_stack + command + b"\x85}\x92.",
        b"(" + command + b"i" + f"{wanted.module}\n{wanted.name}\n".encode() + b".",
        b"(" + steps(wanted) + command + b"o.",
        b"\x80\x02" + steps(Name("argparse", "Namespace")) + b")\x81}" + unicode("__setstate__") + steps(wanted) + b"sb.",
        b"\x80\x02" + steps(Name("torch._tensor", "_rebuild_from_type_v2")) + steps(wanted) + b")t)t}tR.",
    ):
        with pytest.raises(ValueError, match="its pickle asks for `") as error:
            read(content)
        assert f"`{name.replace('__builtin__', 'builtins')}`" in str(error.value)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


class Payload:
    """A pickle that Python's own reader would run."""

    def __reduce__(self) -> Any:
        return exec, ("open('ran', 'w').close()",)


class SetState:
    """Code in __setstate__ of a class that the reader would have to import."""

    def __setstate__(self, state: Any) -> None:
        open("ran", "w").close()

    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_runs(protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value, name in (({"w": [Payload()]}, "builtins.exec"), ({"w": SetState()}, f"{__name__}.SetState")):
        content = pickle.dumps(value, protocol)
        with pytest.raises(ValueError, match=f"asks for `{name}`"):
            read(content)
        assert list(tmp_path.iterdir()) == []
        pickle.loads(content)  # the trap would have sprung
        (tmp_path / "ran").unlink()


def test_what_lies_inside_is_not_read_as_a_pickle() -> None:
    trap = pickle.dumps(Payload())
    assert read(pickle.dumps({"extra": trap}, 4)) == {"extra": trap}
    assert read(pickle.dumps(io.BytesIO(trap), 4)).name == "_io.BytesIO"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02\x82\x01.", "has b'\\\\x82' at byte 2, which torch.save does not write"),  # EXT1
        (b"\x80\x02\x83\x01\x00.", "has b'\\\\x83'"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "has b'\\\\x84'"),
        (b"P0\n.", "has b'P' at byte 0"),  # PERSID
        (b"S'a\\d'\n.", "has b'S' at byte 0"),  # STRING
        (b"\x80\x05\x97.", "has b'\\\\x97'"),  # NEXT_BUFFER
        (b"\x80\x06N.", "has protocol 6, expected 0 to 5"),
        (b"\xff", "has b'\\\\xff' at byte 0"),
        (b"", "ends after 0 bytes"),
        (b"\x80\x02}", "ends after 3 bytes"),
        (b"\x80\x02.", "more or less than one value"),
        (b"\x80\x02NN.", "more or less than one value"),
        (b"\x80\x02N(N.", "more or less than one value"),
        (b"\x80\x02R.", "makes no sense at byte 2"),
        (b"\x80\x02t.", "makes no sense"),
        (b"\x80\x02N\x86.", "makes no sense"),
        (b"\x80\x02h\x05.", "makes no sense"),
        (b"\x80\x02Ng-1\n.", "makes no sense"),
        (b"\x80\x02Np-1\n.", "makes no sense"),
        (b"\x80\x02Nq\x00p-1\n.", "makes no sense"),
        (b"\x80\x02]N\x01\x00.", "has b'\\\\x01'"),
        (b"\x80\x02}Nu.", "makes no sense"),
        (b"\x80\x02}(Nu.", "makes no sense"),
        (b"\x80\x02]NNs.", "makes no sense"),
        (b"\x80\x02}Na.", "makes no sense"),
        (b"\x80\x02X\x05\x00\x00\x00abc", "can't be read at byte 2"),
        (b"\x80\x02X\x02\x00\x00\x00\xff\xff.", "can't be read at byte 2"),
        (b"\x80\x02cos", "can't be read at byte 2"),
        (b"\x80\x02K\x05Q.", "refers to something else than a storage"),
        (b"\x80\x02(X\x06\x00\x00\x00moduleNNNtQ.", "refers to something else than a storage"),
        (b"\x80\x02K\x05)R.", "calls a int; don't trust this file"),
        (b"\x80\x02" + steps(torch.float16) + b")R.", "calls a dtype; don't trust this file"),
        (b"\x80\x02" + steps(Name("torch", "FloatStorage")) + b")\x81.", "calls a StorageType; don't trust this file"),
        (b"\x80\x02]}b.", "sets attributes of a list; don't trust this file"),
        (b"\x80\x02" + steps(Name("collections", "OrderedDict")) + b"N\x85R.", "`collections.OrderedDict` with values that"),
        (b"\x80\x02" + steps(Name("collections", "OrderedDict")) + b"]\x85R]b.", "sets attributes of a dict"),
        (b"\x80\x04" + steps(Name("builtins", "set")) + b")}K\x01K\x02s\x92.", "makes a plain value by keywords"),
        (b"\x80\x04K\x01K\x02\x93.", "names something by other than words"),
        (pickled(Call(Name("builtins", "getattr"), (torch.float16, "a"))), "`builtins.getattr` with values that do not fit"),
        (pickled(Call(Name("builtins", "getattr"), (Name("argparse", "Namespace"), "x"))), "`builtins.getattr` with values"),
        (pickled(Call(Name("builtins", "getattr"), (Name("megatron.a", "B"), "__init__"))), "`builtins.getattr` with values"),
        (pickled(Call(Name("_codecs", "encode"), ("é", "rot13"))), "`_codecs.encode` with values that do not fit"),
        (pickled(Call(Name("_codecs", "encode"), ("\u4e00", "latin1"))), "`_codecs.encode` with values that do not fit"),
        (pickled(Call(Name("builtins", "bytearray"), (10**12,))), "`builtins.bytearray` with values that do not fit"),
        (pickled(Call(Name("builtins", "set"), ([[]],))), "has a list as a key"),
        (pickled({(1, (2,)): 3}), "has a tuple as a key"),
        (pickled({2**64: 1}), "has a number of more than 64 bits as a key"),
        (pickled({1j: 1}), "has a complex as a key"),
        (b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80Ns.", "has a key that is not text"),
        (b"\x80\x02}" + steps(tensor()) + b"Ns.", "has a Tensor as a key"),
    ],
)
def test_what_is_wrong_with_a_pickle_is_said(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(content)
    assert "\n" not in str(error.value)


def test_names_in_messages_are_short_and_on_one_line() -> None:
    for name in ("x" * 100_000, "\x1b[2J\r", "\u202e"):
        with pytest.raises(ValueError, match="asks for") as error:
            read(b"\x80\x04" + unicode("os") + b"\x8d" + struct.pack("<Q", len(name.encode())) + name.encode() + b"\x93.")
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 400


# What an attacker would have us do for hours, or need memory for.


def memory_and_time(content: bytes) -> tuple[int, float]:
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        with pytest.raises(ValueError, match=r"^(its pickle|has) ") as error:
            read(content)
        assert len(str(error.value)) < 400
        return tracemalloc.get_traced_memory()[1], time.perf_counter() - begin
    finally:
        tracemalloc.stop()


ENCODE = steps(Name("_codecs", "encode")) + b"q\x00"
LONG_TEXT = b"X" + struct.pack("<I", 30_000) + b"a" * 30_000 + b"q\x01"
LAUGHS = b"]q\x00" + b"".join(b"0](h%ch%ceq%c" % (i, i, i + 1) for i in range(90))
BOMBS = {
    "a place far away, then nothing": b"\x80\x02Nr\xff\xff\xff\xff",
    "bytes as long as an integer can say": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "a byte array as long as an integer can say": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a frame of exabytes, then nothing": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    "an integer of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "an integer of a million digits": b"L" + b"9" * 1_000_000 + b"L\n0",
    "lists in lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "tuples in tuples": b"\x80\x02)" + b"\x85" * 2_000_000 + b".",
    "dicts of one value": b"\x80\x02](" + b"}NNs" * 400_000 + b"e.",
    "dicts in dicts": b"\x80\x02" + b"}N" * 100_000 + b"}" + b"s" * 100_000 + b".",
    "marks in marks": b"(" * 2_000_000,
    "a tuple in tuples as a key": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
    "records in records": b"\x80\x02" + b"cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00a" * 2_000 + b"N" + b"sb" * 2_000 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a dict in itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "a record in itself": b"\x80\x02cargparse\nNamespace\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.",
    "lists that each hold the last one twice": b"\x80\x02" + LAUGHS + b".",
    "a long text made bytes again and again": b"\x80\x02]"
    + ENCODE
    + LONG_TEXT
    + b"00"
    + b"h\x00h\x01U\x06latin1\x86Ra" * 3_000
    + b".",
    "sets by the thousand": b"\x80\x04](" + b"\x8f" * 400_000 + b"e.",
    "tensors by the thousand": b"\x80\x02](" + steps(tensor()).replace(b"R", b"q\x07Rq\x08", 1) + b"h\x08" * 10,
    "the same tensor made again and again": (
        b"\x80\x02]"
        + steps(tensor().function)
        + b"q\x05"
        + steps(tensor().args)
        + b"q\x06R0"
        + b"("
        + b"h\x05h\x06R" * 200_000
        + b"e."
    ),
    "a name that grows": (
        b"\x80\x02"
        + steps(Name("builtins", "getattr"))
        + b"q\x00"
        + steps(Name("megatron", "A"))
        + b"q\x01"
        + (b"h\x00h\x01X\x60\x00\x00\x00" + b"a" * 96 + b"\x86Rq\x01") * 5_000
        + b"."
    ),
    "a long name made again and again": (
        b"\x80\x04" + unicode("megatron") + b"q\x00" + unicode("a" * 30_000) + b"q\x01](" + b"h\x00h\x01\x93" * 5_000 + b"e."
    ),
    "keys that are tuples": pickled({(i, 0): None for i in range(5_000)}),
    "attributes copied again and again": (
        b"\x80\x02"
        + steps({f"a{i}": i for i in range(3_000)})
        + b"q\x00cargparse\nNamespace\nq\x01"
        + b"h\x01)\x81h\x00b" * 3_000
        + b"."
    ),
    "storages with long names": (
        b"\x80\x02" + unicode("k" * 100_000) + b"q\x00" + steps(Storage()).replace(unicode("0"), b"h\x00") + b"."
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_pickle_can_not_make_much(kind: str) -> None:
    memory, seconds = memory_and_time(BOMBS[kind])
    assert memory < 40 * len(BOMBS[kind]) + (16 << 20), f"{memory:,} bytes for a pickle of {len(BOMBS[kind]):,}"
    assert seconds < 5


def test_names_of_python_are_the_same_without_torch() -> None:
    assert unpickle(io.BytesIO(pickle.dumps({1, 2}, 2)), plain_names) == {1, 2}
    with pytest.raises(ValueError, match=r"asks for `torch\.FloatStorage`"):
        unpickle(io.BytesIO(pickled(Name("torch", "FloatStorage"))), plain_names)
    with pytest.raises(ValueError, match="refers to storages where there are none"):
        unpickle(io.BytesIO(b"\x80\x02NQ."), plain_names)


def test_the_next_pickle_of_a_stream_is_left_to_be_read() -> None:
    stream = io.BytesIO(pickle.dumps([1], 2) + pickle.dumps("x", 4) + b"rest")
    assert unpickle(stream, plain_names) == [1]
    assert unpickle(stream, plain_names) == "x"
    assert stream.read() == b"rest"
