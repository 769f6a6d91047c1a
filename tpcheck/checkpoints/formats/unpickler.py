"""Read a pickle without importing, creating or calling anything that it names.

Why not `torch.load(mmap=True, weights_only=True)`, which also refuses code? Measured with torch 2.13 on the 63 files of
torch.save in tests/checkpoints/hostile.py, one process each:

- It opens 8 of them without a warning: among them compressed records and a storage shorter than its tensors say, whose
  elements come out as other numbers, a record that is there twice, and a tensor of 4 petabytes.
- It ends the process for one (segmentation fault: keys nested deeply), takes over 20 s for one (a name of a megabyte)
  and 386 MiB for a zip file of 0.2 MB. Its errors are of 8 exception types.
- It maps the file: one that is truncated later ends the process with SIGBUS. Reading 256 MB leaves 299 MiB resident,
  62 MiB here. It cannot map the legacy format, which it therefore reads whole.
- DeepSpeed's states and torch's `.metadata` name classes. weights_only needs them imported, so DeepSpeed installed, and
  creates them; torch itself reads `.metadata` with a bare `pickle.load`.
- It has been bypassed twice: before torch 2.6 (CVE-2025-32434) and before 2.10 (CVE-2026-24747); 2.6 is supported here.

The table of contents of 3,000 tensors takes 0.09 s of CPU time here, 0.13 s with `torch.load`.
"""

from __future__ import annotations

import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from tpcheck.checkpoints.formats.files import OpenFile, shortened
from tpcheck.checkpoints.formats.storage_view import Storage, StorageView, storage_view
from tpcheck.core.errors import CheckpointError


@dataclass(eq=False, slots=True)
class PickledObject:
    """An object of a pickle that is not created.

    Attributes:
        name: Module and name of its class, or of the function that the pickle calls to create it.
        arguments: The arguments of that call.
        state: The argument of `__setstate__`, or the contents of `__dict__`.
        entries: Items set by key.
        elements: Elements appended or added.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by name; `call` replaces calling it."""

    name: str
    call: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        return PickledObject(self.name, arguments) if self.call is None else self.call(*arguments)


def replacement(name: str) -> Any:
    """Return what replaces a class, function or dtype that `weights_only` allows, too; None for any other."""
    module, _, last = name.rpartition(".")
    if module == "torch" and isinstance(getattr(torch, last, None), torch.dtype):
        return getattr(torch, last)
    if module in ("torch", "torch.cuda", "torch.storage") and last in STORAGE_DTYPES:
        return Global(name)
    if name in CALLS:
        return Global(name, CALLS[name])
    return Global(name) if name in UNREADABLE else None


def storage_dtype(kind: Any) -> torch.dtype:
    """Return the dtype of a storage class."""
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


def _tensor_v2(
    storage: Storage, start: int, size: Any, stride: Any, _grad: Any = False, _hooks: Any = None, metadata: Any = None
) -> StorageView | PickledObject:
    if metadata:
        return PickledObject("a lazily conjugated or negated view")
    return storage_view(storage, start, size, stride)


def _tensor_v3(
    storage: Storage, start: int, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> StorageView | PickledObject:
    if metadata:
        return PickledObject("a lazily conjugated or negated view")
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError("a tensor is of no known dtype")
    return storage_view(storage, start, size, stride, dtype=dtype)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _from_type(function: Any, kind: Any, arguments: Any, state: Any = None, *_: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise CheckpointError("a tensor is created in an unknown way")
    tensor = function(*arguments)
    if isinstance(tensor, PickledObject):
        tensor.state = state  # a DTensor keeps its rank's shard there
    return tensor


def _encoded(text: Any = b"", encoding: Any = "utf-8") -> bytes:
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str) or encoding not in ("latin1", "utf-8"):
        raise CheckpointError("bytes are encoded in an unknown way")
    return text.encode(encoding)


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    entries: OrderedDict[Any, Any] = OrderedDict()
    for key, value in pairs:
        entries[hashable(key)] = value
    return entries


def hashable(key: Any) -> Any:
    """Return the key if hashing it does not recurse: a hostile file nests tuples until the stack overflows."""
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, (str, bytes, int, float, complex, type(None), torch.dtype)) for part in parts):
        raise CheckpointError(f"a key is of type {type(key).__name__}")
    return key


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": lambda sizes=(): tuple(sizes) if isinstance(sizes, (tuple, list)) else (),
    "collections.OrderedDict": _ordered,
    "collections.Counter": lambda counts=(): Counter({hashable(key): counts[key] for key in counts}),
    "builtins.set": lambda elements=(): {hashable(element) for element in elements},
    "builtins.frozenset": lambda elements=(): frozenset(hashable(element) for element in elements),
    "builtins.bytearray": _encoded,
    "builtins.bytes": lambda: b"",  # as protocol 2 writes it; with a number it would allocate
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
"""Harmless, and kept as `PickledObject`: quantized, sparse, nested and wrapped tensors have no plain elements."""


MAX_PICKLE_NBYTES = 64 << 20
"""Ten times what as many tensors need as `MAX_STEPS` allows."""

MAX_STEPS = 4_000_000
"""Steps of one pickle: 60,000 tensors. Bounds the memory that it takes, since a step creates 100 bytes at most."""

_IMPORTS = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.tensor": "torch._tensor"}
"""Modules by their names in protocol 2 and in old torch."""


class Stream:
    """A part of a file, read from its start to its end and no further."""

    def __init__(self, file: OpenFile, start: int, end: int, *, max_steps: int = MAX_STEPS) -> None:
        self._file = file
        self._steps_left = max_steps
        self._position, self._end = start, end
        self._buffer, self._buffer_start = b"", start

    @property
    def position(self) -> int:
        return self._position

    def read(self, nbytes: int) -> bytes:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise CheckpointError("the pickle has too many steps")
        if nbytes > self._end - self._position:
            raise CheckpointError("the pickle is truncated")
        begin = self._position - self._buffer_start
        if begin + nbytes > len(self._buffer):
            length = min(max(nbytes, 1 << 16), self._end - self._position)
            self._buffer, self._buffer_start = bytes(self._file.read(self._position, length)), self._position
            begin = 0
        self._position += nbytes
        return self._buffer[begin : begin + nbytes]

    def readline(self) -> bytes:
        line = bytearray()
        while not line.endswith(b"\n"):
            if len(line) > 1000:
                raise CheckpointError("the pickle has a name of more than 1000 characters")
            line += self.read(1)
        return bytes(line)


class SafeUnpickler(pickle._Unpickler):
    """Creates containers, numbers and strings of Python only; looks classes up in a table and never imports them.

    Extends the unpickler in Python, since a single opcode makes the one in C allocate any amount of memory.

    Attributes:
        refused: Names of classes and functions that are neither known nor in `keep`.
    """

    stack: list[Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: Stream, *, keep: Collection[str], persistent_load: Callable[[Any], Any]) -> None:
        super().__init__(stream, encoding="latin1")
        self.refused: dict[str, None] = {}
        self._keep = keep
        self._persistent_load = persistent_load

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent_load(pid)

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{_IMPORTS.get(module, module)}.{name}"
        known = replacement(full_name)
        if known is not None:
            return known
        if not any(fnmatchcase(full_name, pattern) for pattern in self._keep):
            self.refused[full_name] = None
        return Global(full_name)

    def load_frame(self) -> None:
        self.read(8)  # the length of a frame, which is for readers that read ahead

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        self.load_reduce()

    def load_newobj_ex(self) -> None:
        keywords = self.stack.pop()
        self.load_reduce()
        if isinstance(self.stack[-1], PickledObject):
            self.stack[-1].state = keywords

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], PickledObject):
            self.stack[-1].state = state

    def load_append(self) -> None:
        element = self.stack.pop()
        self._extend([element])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def load_additems(self) -> None:
        elements = self.pop_mark()
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(hashable(element) for element in elements)
        else:
            self._extend(elements)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _extend(self, elements: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (list, PickledObject)):
            raise CheckpointError(f"an element is appended to a {type(target).__name__}")
        (target.elements if isinstance(target, PickledObject) else target).extend(elements)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (dict, PickledObject)):
            raise CheckpointError(f"an entry is set in a {type(target).__name__}")
        entries = target.entries if isinstance(target, PickledObject) else target
        for key, value in zip(items[::2], items[1::2], strict=True):
            if hashable(key) in entries:
                raise CheckpointError(f"the key {shortened(key)} is set twice")
            entries[key] = value


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise CheckpointError(f"an object of type {type(function).__name__} is called")
    return function(*arguments)


_INHERITED = (
    "PROTO BINPERSID NONE NEWFALSE NEWTRUE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINSTRING BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BINUNICODE SHORT_BINUNICODE BINUNICODE8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_LIST EMPTY_DICT EMPTY_SET GLOBAL STACK_GLOBAL BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE MARK STOP"
).split()
_OVERRIDDEN = "FRAME REDUCE NEWOBJ NEWOBJ_EX BUILD APPEND APPENDS ADDITEMS SETITEM SETITEMS".split()

# No file of torch holds the other opcodes: text of protocol 0, extension codes, out-of-band buffers.
SafeUnpickler.dispatch = {
    **{getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _INHERITED},
    **{getattr(pickle, name)[0]: getattr(SafeUnpickler, f"load_{name.lower()}") for name in _OVERRIDDEN},
}
