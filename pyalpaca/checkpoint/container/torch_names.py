"""The names that a pickle of torch.save may use, and what each stands for: the allow-list of `unpickle`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyalpaca.checkpoint.container.pickle_machine import MisfitError, Refused, Rule
from pyalpaca.checkpoint.container.plain_names import plain_names

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_NEW_DTYPES = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
"""Types younger than typed storages: their tensors lie in a storage of bytes and are made by `_rebuild_tensor_v3`."""

_KINDS = {
    "_rebuild_qtensor": "a quantized tensor, expected plain ones; dequantize it and save it again",
    "_rebuild_sparse_tensor": "a sparse tensor, expected dense ones; save it again after to_dense()",
    "_rebuild_nested_tensor": "a nested tensor, expected plain ones; save its parts",
    "_rebuild_meta_tensor_no_storage": "a tensor without data (of the meta device), expected data; save the loaded model",
    "_rebuild_wrapper_subclass": "a tensor subclass, expected plain tensors; save what it holds",
    "_rebuild_device_tensor_from_numpy": "a tensor kept as a numpy array, expected plain ones; move it to the CPU before saving",
    "_rebuild_xla_tensor": "a tensor kept as a numpy array, expected plain ones; move it to the CPU before saving",
}


@dataclass(frozen=True)
class StorageType:
    """A class of storages: the type of their elements."""

    dtype: torch.dtype


@dataclass(frozen=True)
class TensorType:
    """torch.Tensor or torch.nn.Parameter as a value."""


@dataclass(frozen=True)
class StorageRef:
    """A storage that a pickle refers to: `count` elements of `dtype` named `key`, of which tensors may use [start, stop)."""

    key: str
    dtype: torch.dtype
    count: int
    start: int
    stop: int


Build = Callable[[StorageRef, torch.dtype, int, tuple[int, ...], tuple[int, ...]], Tensor]
"""(storage, dtype, offset, shape, strides) -> tensor; offset and strides in elements of dtype."""


def storage_ref(persistent_id: Any) -> StorageRef:
    """The storage of a persistent id; ValueError if it is none."""
    match persistent_id:
        case (str(kind), StorageType(dtype), str(key), _, int(count), *view) if kind == "storage" and len(key) < 1000:
            match view:
                case [] | [None]:
                    start, stop = 0, count
                # Files before torch 0.4: a storage that is elements [offset, offset + size) of another.
                case [(_, int(offset), int(size))]:
                    start, stop = offset, offset + size
                case _:
                    raise ValueError("its pickle refers to an unknown part of a storage; it is damaged")
        case _:
            raise ValueError("its pickle refers to something else than a storage; it is damaged")
    if not 0 <= start <= stop <= count < 1 << 62:
        raise ValueError("its pickle refers to elements that their storage does not have; it is damaged")
    return StorageRef(key, dtype, count, start, stop)


def torch_names(build: Build) -> Callable[[str], Any]:
    """What each name stands for in a file whose tensors `build` makes; None if the name is not on the list."""

    def tensor(args: tuple[Any, ...]) -> Tensor:
        match args:
            case (StorageRef() as ref, int(offset), tuple(size), tuple(stride)):
                return build(ref, ref.dtype, offset, size, stride)
            case (StorageRef() as ref, int(offset), tuple(size), tuple(stride), _, _):
                return build(ref, ref.dtype, offset, size, stride)
            case (StorageRef() as ref, int(offset), tuple(size), tuple(stride), _, _, dict(bits)):
                if any(bits.values()):
                    raise ValueError("holds a tensor that is yet to be negated or conjugated; save it again after resolve_neg()")
                return build(ref, ref.dtype, offset, size, stride)
        raise MisfitError

    def new_type(args: tuple[Any, ...]) -> Tensor:
        match args:
            case (StorageRef() as ref, int(offset), tuple(size), tuple(stride), _, _, torch.dtype() as dtype, *_):
                return build(ref, dtype, offset, size, stride)
        raise MisfitError

    def of_npu(args: tuple[Any, ...]) -> Tensor:
        """Torch of Ascend NPUs: the storage was brought to the CPU before, the last argument is the format to have on the NPU."""
        match args:
            case (StorageRef() as ref, int(offset), tuple(size), tuple(stride), _, _, *_):
                return build(ref, ref.dtype, offset, size, stride)
        raise MisfitError

    rules = {"_rebuild_tensor": tensor, "_rebuild_tensor_v2": tensor, "_rebuild_tensor_v3": new_type}
    plain = {f"torch._utils.{name}": Rule(f"torch._utils.{name}", make, cost=100) for name, make in rules.items()}
    npu = "torch_npu.utils.storage._rebuild_npu_tensor"
    known = {**_FIXED, **plain, npu: Rule(npu, of_npu, cost=100)}

    def find(name: str) -> Any:
        found = known.get(name)
        return plain_names(name) if found is None else found

    return find


def _parameter(args: tuple[Any, ...]) -> Tensor:
    match args:
        case (Tensor() as data, _, _) | (Tensor() as data, _, _, _):
            return data
    raise MisfitError


def _with_attributes(args: tuple[Any, ...]) -> Tensor:
    """A tensor to which a program gave attributes; they are dropped."""
    match args:
        case (Rule(name=name) as rule, TensorType(), tuple(inner), _) if name.startswith("torch._utils._rebuild"):
            made: Tensor = rule.make(inner)
            return made
    raise MisfitError


def _from_cpu(args: tuple[Any, ...]) -> Tensor:
    match args:
        case (Tensor(dtype=found) as data, torch.dtype() as dtype, _, _) if found == dtype:
            return data
    raise MisfitError


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    match args:
        case (tuple(size),):
            return size
    raise MisfitError


_WRAPPERS = {
    "torch.Size": _size,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _from_cpu,
    "torch._tensor._rebuild_from_type": _with_attributes,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.tensor._rebuild_from_type": _with_attributes,
}
_FIXED: dict[str, Any] = {
    **{name: Rule(name, make, cost=100) for name, make in _WRAPPERS.items()},
    **{f"{module}.{name}": StorageType(dtype) for name, dtype in _STORAGES.items() for module in ("torch", "torch.cuda")},
    **{f"{m}.{n}": StorageType(torch.uint8) for m in ("torch", "torch.storage") for n in ("UntypedStorage", "_UntypedStorage")},
    **{str(dtype): dtype for dtype in (*_STORAGES.values(), *_NEW_DTYPES)},
    **dict.fromkeys(("torch.Tensor", "torch.nn.parameter.Parameter"), TensorType()),
    **{f"torch._utils.{name}": Refused(reason) for name, reason in _KINDS.items()},
}
