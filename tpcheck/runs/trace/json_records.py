"""Records as JSON, and back: what is read may come from a stranger, so every type, size and text is checked."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol, TypeAlias

import torch

from tpcheck.core.errors import TpcheckError
from tpcheck.numerics.sketch import Sketch
from tpcheck.runs.trace.records import TensorRecord

LONGEST_TEXT = 4096
DEEPEST_OPTION = 8  # of tuples inside an option of an optimizer
STORED_AS_FLOAT32 = ("float32", "bfloat16", "float16")
"""Dtypes whose sketches are stored as float32: their elements are no more exact, and `sketch_rounding`, ten times of
which is allowed, takes their sums as float32. Of a vector of up to 256 elements each tile has one, which it holds."""

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Malformed(ValueError):
    """What is wrong with a value, and where it is, from the inside out."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.path: list[str] = []

    def __str__(self) -> str:
        where = "".join(reversed(self.path)).removeprefix(".")
        return f"{where} {self.args[0]}" if where else f"it {self.args[0]}"


class TensorSink(Protocol):
    """Keeps the tensors of records while they become JSON, in the order in which they are met."""

    def put_tiles(self, tiles: torch.Tensor, *, as_float32: bool) -> None: ...

    def put_full(self, tensor: torch.Tensor) -> None: ...


class TensorSource(Protocol):
    """Gives the tensors of records back, in the same order.

    Raises:
        Malformed: There is no such tensor.
    """

    def next_tiles(self, *, as_float32: bool) -> torch.Tensor: ...

    def next_full(self, number: int, dtype: str) -> Sequence[torch.Tensor]: ...


# ---- to JSON


def to_plain(record: Any, sink: TensorSink, *, omitted: Sequence[str] = ()) -> Any:
    """Return a dataclass as dicts, lists, numbers and text; give its tensors to the sink.

    Args:
        omitted: Names of fields to leave out.
    """
    if isinstance(record, TensorRecord):
        return _plain_tensor(record, sink)
    if dataclasses.is_dataclass(record):
        return to_plain_fields(record, sink, omitted=omitted)
    if isinstance(record, Mapping):
        return {printable(key): to_plain(value, sink) for key, value in record.items()}
    if isinstance(record, (tuple, list)):
        return [to_plain(value, sink) for value in record]
    if record is None or isinstance(record, (bool, int)):
        return record
    return _plain_number(record) if isinstance(record, float) else printable(record)


def to_plain_fields(record: Any, sink: TensorSink, *, omitted: Sequence[str] = ()) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults."""
    plain = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.name not in omitted and not (value is field.default or (not value and _is_empty(field))):
            plain[field.name] = to_plain(value, sink)
    return plain


def _plain_tensor(record: TensorRecord, sink: TensorSink) -> dict[str, Any]:
    """Return one of a step's hundreds of records: field by field takes a fifth of the time of looking fields up."""
    for tensor in record.full:
        sink.put_full(tensor)
    as_float32 = record.dtype in STORED_AS_FLOAT32
    readings = []
    for reading in record.readings:
        sketch = reading.sketch
        sink.put_tiles(sketch.tiles, as_float32=as_float32)
        plain: dict[str, Any] = {
            "label": printable(reading.label),
            "shape": [*reading.shape],
            "piece": printable(reading.piece),
            "sketch": [_plain_number(sketch.sum_squares), sketch.numel, sketch.nonfinite],
        }
        if reading.is_term:
            plain["is_term"] = True
        if reading.deviation is not None:
            plain["deviation"] = _plain_number(reading.deviation)
        if reading.order:
            plain["order"] = printable(reading.order)
        readings.append(plain)
    fields = {
        "kind": record.kind,
        "name": printable(record.name),
        "part": printable(record.part),
        "call": record.call,
        "dtype": record.dtype,
        "shape": [*record.shape],
        "digest": record.digest,
        "readings": readings,
    }
    if record.digest_before:
        fields["digest_before"] = record.digest_before
    if len(record.full):
        fields["full"] = len(record.full)
    return fields


def as_line(plain: Any) -> bytes:
    """Return one line of JSON."""
    return json.dumps(plain, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def printable(value: Any) -> str:
    """Return text that a terminal shows as it is, and that is not too long."""
    text = str(value)[:LONGEST_TEXT]
    return text if text.isprintable() else "".join(letter if letter.isprintable() else " " for letter in text)


def _plain_number(number: float) -> float | str:
    return number if math.isfinite(number) else str(float(number))


def _is_empty(field: dataclasses.Field[Any]) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return True
    return isinstance(field.default, tuple) and not field.default


# ---- from JSON


def parse_line(line: bytes) -> dict[str, Any]:
    """Return the object in a line of JSON.

    Raises:
        Malformed: It is anything else.
    """
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise Malformed("is nested too deeply") from None
    except (ValueError, MemoryError) as error:
        raise Malformed(f"is not JSON: {printable(error)[:200]}") from None
    if not isinstance(value, dict):
        raise Malformed(f"is {_kind(value)}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key is there twice")
    return entries


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number of JSON")


Decoder: TypeAlias = "Callable[[Any, TensorSource], Any]"


@cache  # types of this package's fields
def decoder_of(hint: Any, omitted: tuple[str, ...] = ()) -> Decoder:
    """Return a function that makes a value of this type of what JSON holds, or raises `Malformed`.

    Args:
        hint: A dataclass, str, int, float, bool, Any, or a tuple, mapping, union or literal of these.
        omitted: Fields of the dataclass that are not read; the function then returns the others as a dict.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if origin is typing.Literal:
        return lambda value, source: _chosen(value, arguments)
    if origin is tuple:
        return _tuple_decoder(_integer_or_row if arguments[0] is int else decoder_of(arguments[0]))
    if origin in (typing.Union, types.UnionType):
        (inner,) = (decoder_of(argument) for argument in arguments if argument is not type(None))
        return lambda value, source: None if value is None else inner(value, source)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping_decoder(decoder_of(arguments[1]))
    return _dataclass_decoder(hint, omitted)


def _dataclass_decoder(cls: Any, omitted: tuple[str, ...]) -> Decoder:
    hints = typing.get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.name not in omitted]
    # `full` is a number here: the tensors are in another file.
    decoders = [
        (field.name, decoder_of(int if (cls, field.name) == (TensorRecord, "full") else hints[field.name]))
        for field in fields
        if cls is not TensorRecord or field.name != "readings"
    ]
    needed = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    names = {field.name for field in fields}

    def decode(value: Any, source: TensorSource) -> Any:
        if not isinstance(value, dict):
            raise Malformed(f"is {_kind(value)}, not an object")
        if not needed <= value.keys() <= names:
            wrong = sorted(needed - value.keys()) or sorted(value.keys() - names)
            raise Malformed(f"lacks {wrong[0]}" if needed - value.keys() else f"has {printable(wrong[0])[:80]!r}")
        result = {}
        for name, decode_field in decoders:
            if name in value:
                result[name] = _within(f".{name}", decode_field, value[name], source)
        if cls is TensorRecord:
            low = _TilesOf(source, result["dtype"] in STORED_AS_FLOAT32)
            result["readings"] = _within(".readings", decoder_of(hints["readings"]), value["readings"], low)
            if result.get("full"):
                result["full"] = _within(".full", _full_decoder(result["dtype"]), result["full"], source)
            else:
                result.pop("full", None)
        if omitted:
            return result
        try:
            return cls(**result)
        except TpcheckError as error:
            raise Malformed(f"is impossible: {error}") from None

    return decode


def _full_decoder(dtype: str) -> Decoder:
    return lambda number, source: source.next_full(number, dtype)


class _TilesOf:
    """The source of the tiles of one tensor."""

    def __init__(self, source: TensorSource, as_float32: bool) -> None:
        self._source = source
        self._as_float32 = as_float32

    def next_tiles(self, *, as_float32: bool = False) -> torch.Tensor:
        return self._source.next_tiles(as_float32=self._as_float32)

    def next_full(self, number: int, dtype: str) -> Sequence[torch.Tensor]:
        return self._source.next_full(number, dtype)


def _tuple_decoder(decode_item: Decoder) -> Decoder:
    def decode(value: Any, source: TensorSource) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise Malformed(f"is {_kind(value)}, not a list")
        return tuple(_within(f"[{number}]", decode_item, item, source) for number, item in enumerate(value))

    return decode


def _mapping_decoder(decode_item: Decoder) -> Decoder:
    def decode(value: Any, source: TensorSource) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Malformed(f"is {_kind(value)}, not an object")
        return {_text(key, source): _within(f".{key}", decode_item, item, source) for key, item in value.items()}

    return decode


def _within(where: str, decode: Decoder, value: Any, source: TensorSource) -> Any:
    try:
        return decode(value, source)
    except Malformed as malformed:
        malformed.path.append(where)
        raise


def _text(value: Any, source: TensorSource) -> str:
    if not isinstance(value, str):
        raise Malformed(f"is {_kind(value)}, not text")
    if len(value) > LONGEST_TEXT or not value.isprintable():
        raise Malformed("is text that is too long or has control characters")
    return value


def _integer(value: Any, source: TensorSource, *, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 1 << 62:
        raise Malformed(f"is {_brief(value)}, not a number of things")
    return value


def _integer_or_row(value: Any, source: TensorSource) -> int:
    return _integer(value, source, least=-1)  # in shapes


def _number(value: Any, source: TensorSource) -> float:
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if type(value) not in (int, float):
        raise Malformed(f"is {_brief(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Malformed("is a number that is too large")
    return number


def _bool(value: Any, source: TensorSource) -> bool:
    if not isinstance(value, bool):
        raise Malformed(f"is {_brief(value)}, neither true nor false")
    return value


def _option(value: Any, source: TensorSource, depth: int = 0) -> Any:
    """Decode an option of an optimizer: a number, text, bool, None, or a tuple of these."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _NOT_FINITE[value] if value in _NOT_FINITE else _text(value, source)
    if isinstance(value, list) and depth < DEEPEST_OPTION:
        return tuple(_option(item, source, depth + 1) for item in value)
    if type(value) is int and abs(value) < 1 << 62:
        return value
    return _number(value, source)


def _sketch(value: Any, source: TensorSource) -> Sketch:
    if not isinstance(value, list) or len(value) != 3:
        raise Malformed(f"is {_brief(value)}, not a sum of squares and two counts")
    sum_squares, numel, nonfinite = _number(value[0], source), _integer(value[1], source), _integer(value[2], source)
    return Sketch(source.next_tiles(as_float32=False), sum_squares, numel, nonfinite)


def _chosen(value: Any, choices: tuple[Any, ...]) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise Malformed(f"is {_brief(value)}, not one of {', '.join(choices)}")
    return value


_SIMPLE: dict[Any, Decoder] = {
    str: _text,
    int: _integer,
    float: _number,
    bool: _bool,
    Any: _option,
    Sketch: _sketch,
}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a bool", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _brief(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return _kind(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 62:
        return "a number that is too large"
    text = printable(json.dumps(value))
    return text if len(text) <= 60 else f"{text[:60]}..."
