"""What stands for classes and functions that a pickle names: nothing that a file names is imported, made or called.

`torch.load(weights_only=True)` makes objects of allowed classes, and has been bypassed (CVE-2025-32434,
CVE-2026-24747 before torch 2.10). Here tensors become `StoredTensor`, plain containers are made, and everything else
becomes a record, so no version of torch matters.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tpcheck.checkpoints.stored import Storage, StoredTensor, stored_tensor
from tpcheck.errors import CheckpointError


@dataclass(eq=False, slots=True)
class Inert:
    """An object that was not made.

    Attributes:
        name: Module and name of its class, or of the function that would have made it.
        arguments: What the class or function would have been called with.
        state: What `__setstate__` or `__dict__` would have got.
        entries: What would have been set by key.
        elements: What would have been appended or added.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function, by name; `call` is what stands for calling it."""

    name: str
    call: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        return Inert(self.name, arguments) if self.call is None else self.call(*arguments)


def known(name: str) -> Any:
    """Return what stands for a class, function or dtype that torch's own list allows; None for any other."""
    module, _, last = name.rpartition(".")
    if module == "torch" and isinstance(getattr(torch, last, None), torch.dtype):
        return getattr(torch, last)
    if module in ("torch", "torch.cuda", "torch.storage") and last in STORAGE_DTYPES:
        return Global(name)
    if name in CALLS:
        return Global(name, CALLS[name])
    return Global(name) if name in UNREADABLE else None


def storage_dtype(kind: Any) -> torch.dtype:
    """Return what a storage class holds."""
    if not isinstance(kind, Global) or kind.name.rpartition(".")[2] not in STORAGE_DTYPES:
        raise CheckpointError("a storage is of no known type")
    return STORAGE_DTYPES[kind.name.rpartition(".")[2]]


STORAGE_DTYPES = {
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
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}


def _tensor(storage: Storage, start: int, size: Any, stride: Any, *_: Any) -> StoredTensor:
    return stored_tensor(storage, start, size, stride)


def _tensor_v2(
    storage: Storage, start: int, size: Any, stride: Any, grad: Any = False, hooks: Any = None, metadata: Any = None
) -> StoredTensor | Inert:
    if metadata:
        return Inert("a lazily conjugated or negated view")
    return stored_tensor(storage, start, size, stride, requires_grad=grad is True)


def _tensor_v3(
    storage: Storage, start: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> StoredTensor | Inert:
    if metadata:
        return Inert("a lazily conjugated or negated view")
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError("a tensor is of no known dtype")
    return stored_tensor(storage, start, size, stride, dtype=dtype, requires_grad=grad is True)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _from_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise CheckpointError("a tensor is made in an unknown way")
    return function(*arguments)


def _encoded(text: Any = b"", encoding: Any = "utf-8") -> bytes:
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str) or encoding not in ("latin1", "utf-8"):
        raise CheckpointError("bytes are encoded in an unknown way")
    return text.encode(encoding)


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    entries: OrderedDict[Any, Any] = OrderedDict()
    for key, value in pairs:
        entries[scalar(key)] = value
    return entries


def scalar(key: Any) -> Any:
    """Return a key that can be hashed without recursion: a hostile file nests tuples until the stack is full."""
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, (str, bytes, int, float, complex, type(None), torch.dtype)) for part in parts):
        raise CheckpointError(f"a key is of type {type(key).__name__}")
    return key


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": lambda sizes=(): tuple(sizes) if isinstance(sizes, (tuple, list)) else (),
    "collections.OrderedDict": _ordered,
    "collections.Counter": lambda counts=(): Counter({scalar(key): counts[key] for key in counts}),
    "builtins.set": lambda elements=(): {scalar(one) for one in elements},
    "builtins.frozenset": lambda elements=(): frozenset(scalar(one) for one in elements),
    "builtins.bytearray": _encoded,
    "builtins.complex": lambda real=0.0, imaginary=0.0: complex(float(real), float(imaginary)),
    "_codecs.encode": _encoded,
}

UNREADABLE = frozenset(
    """torch.Tensor torch.device torch.serialization._get_layout torch.per_tensor_affine torch.per_tensor_symmetric
    torch.per_channel_affine torch.per_channel_symmetric torch.per_channel_affine_float_qparams
    torch._utils._rebuild_qtensor torch._utils._rebuild_sparse_tensor torch._utils._rebuild_meta_tensor_no_storage
    torch._utils._rebuild_nested_tensor torch._utils._rebuild_wrapper_subclass
    torch._utils._rebuild_device_tensor_from_numpy torch._utils._rebuild_device_tensor_from_cpu_tensor
    torch.nn.parameter.Buffer""".split()
)
"""Known to be harmless, and kept as records: quantized, sparse, nested and foreign tensors have no plain bytes."""
