"""The names of Python itself, and of training programs, that a pickle may use, and what each stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyalpaca.checkpoint.container.pickle_machine import Inert, MisfitError, Rule, check_key

_INERT = frozenset(
    [
        # Beside the tensors of a training program: its arguments, paths, signals, buffers, and the random state of numpy.
        "argparse.Namespace",
        "types.SimpleNamespace",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "datetime.datetime",
        "datetime.timedelta",
        "signal.Signals",
        "_io.BytesIO",
        "io.BytesIO",
        "numpy.ndarray",
        "numpy.dtype",
        # Types named as values, such as the factory of a defaultdict.
        *(f"builtins.{name}" for name in ("object", "bool", "int", "float", "str", "list", "tuple", "dict", "range", "slice")),
        "torch.device",
        "torch.Generator",
        "torch._C.Generator",
        "torch.storage.TypedStorage",
        "torch_npu.npu._format.Format",
    ]
)
_INERT_ALIASES = {
    f"{module}.{name}": made
    for module, name, made in [
        *((f"numpy.{core}.multiarray", "_reconstruct", "numpy.ndarray") for core in ("core", "_core")),
        *((f"numpy.{core}.multiarray", "scalar", "numpy.generic") for core in ("core", "_core")),
        *((f"numpy.{core}.numeric", "_frombuffer", "numpy.ndarray") for core in ("core", "_core")),
    ]
}
_INERT_PACKAGES = (
    "apex",
    "ascendspeed",
    "deepspeed",
    "megatron",
    "mindspeed",
    "mindspeed_llm",
    "mindspeed_mm",
    "modellink",
    "transformer_engine",
)
"""Training programs whose enums, configurations and loss scalers lie in checkpoints, under names that differ by version."""


def plain_names(name: str) -> Any:
    """What `module.name` stands for: a Rule, an Inert record, or None if it is not on the list."""
    if name in _INERT_ALIASES:
        return Inert(_INERT_ALIASES[name])
    if name in _INERT or _of_training_program(name):
        return Inert(name)
    return _RULES.get(name)


def _of_training_program(name: str) -> bool:
    return name.split(".", 1)[0] in _INERT_PACKAGES


def _ordered_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    """Python 2 gives the content as a list of pairs, Python 3 adds it afterwards."""
    match args:
        case ():
            return {}
        case ([*pairs],):
            if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
                return {check_key(key): value for key, value in pairs}
    raise MisfitError


def _default_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    if len(args) > 1:
        raise MisfitError
    return {}


def _counter(args: tuple[Any, ...]) -> dict[Any, Any]:
    match args:
        case ():
            return {}
        case (dict(counts),):
            return dict(counts)
    raise MisfitError


def _set_of(kind: type) -> Callable[[tuple[Any, ...]], Any]:
    def make(args: tuple[Any, ...]) -> Any:
        match args:
            case () | ([*_],):
                return kind(check_key(item) for items in args for item in items)
        raise MisfitError

    return make


def _bytes(args: tuple[Any, ...]) -> bytes:
    """Bytes as protocols below 3 write them: as the text of the same numbers."""
    match args:
        case ():
            return b""
        case (str(text), str(codec)) if codec in ("latin1", "latin-1"):
            try:
                return text.encode("latin-1")
            except UnicodeEncodeError:
                raise MisfitError from None
    raise MisfitError


def _byte_array(args: tuple[Any, ...]) -> bytearray:
    match args:
        case (bytes(data),):
            return bytearray(data)
    return bytearray(_bytes(args))


def _complex(args: tuple[Any, ...]) -> complex:
    match args:
        case (float(real), float(imaginary)):
            return complex(real, imaginary)
    raise MisfitError


def _attribute(args: tuple[Any, ...]) -> Inert:
    """How some versions of Python write a training program's enum: getattr(class, name)."""
    match args:
        case (Inert(name=owner), str(name)) if _of_training_program(owner) and len(owner) + len(name) < 200:
            if name.isidentifier() and not name.startswith("_"):
                return Inert(f"{owner}.{name}")
    raise MisfitError


def _instance(args: tuple[Any, ...]) -> Inert:
    """How protocols below 2 write an object."""
    match args:
        case (Inert(name=name), Inert(name="builtins.object"), None):
            return Inert(name)
    raise MisfitError


_RULES = {
    name: Rule(name, make, cost=12)
    for name, make in {
        "collections.OrderedDict": _ordered_dict,
        "collections.defaultdict": _default_dict,
        "collections.Counter": _counter,
        "builtins.set": _set_of(set),
        "builtins.frozenset": _set_of(frozenset),
        "builtins.bytes": _bytes,
        "builtins.bytearray": _byte_array,
        "builtins.complex": _complex,
        "builtins.getattr": _attribute,
        "copyreg._reconstructor": _instance,
        "_codecs.encode": _bytes,
    }.items()
}
