"""Walks through a pickle without making anything of what it names: see `inert`."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from typing import Any

from tpcheck.checkpoints.files import OpenFile, shortened
from tpcheck.checkpoints.inert import Global, Inert, known, scalar
from tpcheck.errors import CheckpointError

LARGEST_PICKLE = 64 << 20
"""Bytes: ten times what as many tensors need as the steps below allow."""

MOST_READS = 4_000_000
"""Steps of one pickle: 60,000 tensors. Bounds the memory of what it makes, since a step makes 100 bytes at most."""

_IMPORTS = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.tensor": "torch._tensor"}
"""Modules by the names that protocol 2, and old torch, give them."""


class Stream:
    """A part of a file, read from front to back and no further."""

    def __init__(self, file: OpenFile, start: int, end: int) -> None:
        self._file = file
        self._position, self._end = start, end
        self._buffer, self._buffer_start = b"", start
        self._reads = 0

    @property
    def position(self) -> int:
        return self._position

    def read(self, nbytes: int) -> bytes:
        self._reads += 1
        if self._reads > MOST_READS:
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


class InertUnpickler(pickle._Unpickler):
    """Only Python's own containers, numbers and strings are made; classes are looked up in a table, never imported.

    Written over the unpickler in Python: that in C can be told to allocate any amount of memory by one opcode.

    Attributes:
        refused: Names of classes and functions that are neither known nor wanted.
    """

    stack: list[Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: Stream, *, inert: Collection[str], persistent_load: Callable[[Any], Any]) -> None:
        super().__init__(stream, encoding="latin1")
        self.refused: dict[str, None] = {}
        self._inert = inert
        self._persistent_load = persistent_load

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent_load(pid)

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{_IMPORTS.get(module, module)}.{name}"
        found = known(full_name)
        if found is not None:
            return found
        if not any(fnmatchcase(full_name, pattern) for pattern in self._inert):
            self.refused[full_name] = None
        return Global(full_name)

    def load_frame(self) -> None:
        self.read(8)  # a frame's length, which only matters to who reads ahead

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _made(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        self.load_reduce()

    def load_newobj_ex(self) -> None:
        keywords = self.stack.pop()
        self.load_reduce()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = keywords

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
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
            target.update(scalar(one) for one in elements)
        else:
            self._extend(elements)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _extend(self, elements: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (list, Inert)):
            raise CheckpointError(f"an element is appended to a {type(target).__name__}")
        (target.elements if isinstance(target, Inert) else target).extend(elements)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (dict, Inert)):
            raise CheckpointError(f"an entry is set in a {type(target).__name__}")
        entries = target.entries if isinstance(target, Inert) else target
        for key, value in zip(items[::2], items[1::2], strict=True):
            if scalar(key) in entries:
                raise CheckpointError(f"the key {shortened(key)} is set twice")
            entries[key] = value


def _made(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise CheckpointError(f"an object of type {type(function).__name__} is called")
    return function(*arguments)


_AS_IN_PYTHON = (
    "PROTO BINPERSID NONE NEWFALSE NEWTRUE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINSTRING BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BINUNICODE SHORT_BINUNICODE BINUNICODE8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_LIST EMPTY_DICT EMPTY_SET GLOBAL STACK_GLOBAL BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE MARK STOP"
).split()
_AS_HERE = "FRAME REDUCE NEWOBJ NEWOBJ_EX BUILD APPEND APPENDS ADDITEMS SETITEM SETITEMS".split()

# Others (text of protocol 0, extension codes, out-of-band buffers) appear in no file of torch.
InertUnpickler.dispatch = {
    **{getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _AS_IN_PYTHON},
    **{getattr(pickle, name)[0]: getattr(InertUnpickler, f"load_{name.lower()}") for name in _AS_HERE},
}
