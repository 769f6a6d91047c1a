"""Numbers, places and subjects as short phrases, and lines of styled text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

from tpcheck.report.json_values import printable

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True, slots=True)
class Line:
    """Spans of text, each with a rich style or an empty one."""

    spans: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "".join(text for text, _ in self.spans).rstrip()


def plain(text: str, style: str = "") -> Line:
    """Return a line of one span."""
    return Line(((text, style),))


def labelled(label: str, text: str, style: str = "") -> Iterable[Line]:
    """Yield `text` after a label of fixed width; its further lines are indented below the first."""
    first, *rest = text.splitlines() or [""]
    yield Line((("  ", ""), (f"{label:<10}", "dim"), (first, style)))
    for line in rest:
        yield Line(((" " * 12, ""), (line, style)))


def as_text(lines: Iterable[Line]) -> str:
    """Return the lines as plain text that can be pasted into an issue."""
    return "\n".join(str(line) for line in lines) + "\n"


def as_rich(lines: Iterable[Line]) -> Text:
    """Return the lines for a terminal."""
    from rich.text import Text

    text = Text(overflow="fold", no_wrap=False)
    for line in lines:
        for span, style in line.spans:
            text.append(span, style=style)
        text.append("\n")
    text.rstrip()
    return text


UNKNOWN_CAUSE = "unknown: none of the known causes explains it"
_LONGEST_OPTION = 120  # characters; JSON has longer ones
_RANKS_SHOWN = 8
_ENTRIES_SHOWN = 8
_PHASES = {
    "initialised": "made from scratch",
    "start": "before the first step",
    "step": "optimizer step {step}",
    "update": "optimizer step {step}",
    "saved": "saved after step {step}",
    "loaded": "loaded into new processes after step {step}",
    "resumed": "step {step} of the resumed training",
}
_SUBJECT_PARTS = {
    *("family", "model", "subject", "backend", "tp", "dp"),
    *("zero", "zero_stage", "dtype", "steps", "seed", "settings", "target", "shrunk", "configuration"),
}


def error(value: float) -> str:
    """Return a relative error or a tolerance: `8.3e-01`."""
    return f"{value:.1e}" if value else "0"


def margin(value: float) -> str:
    """Return a margin: `0.113`, `2.0e+12`, `inf`."""
    if not isfinite(value):
        return str(value)
    return f"{value:.3g}" if value == 0 or 1e-3 <= value < 1e3 else f"{value:.1e}"


def pluralize(number: float, noun: str) -> str:
    """Return `1 step` or `2 steps`."""
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"


def numbers(values: float | Sequence[float]) -> str:
    """Return the distinct numbers: `1.25`, `1.25 and 1.5`."""
    listed = values if isinstance(values, Sequence) else [values]
    return " and ".join(dict.fromkeys(f"{value:.6g}" for value in listed))


def join_truncated(names: Sequence[str], limit: int) -> str:
    """Return the first names of a list, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def compact_names(names: Sequence[str]) -> list[str]:
    """Return one text for all names that differ in numbers alone.

    Example:
        >>> compact_names(["layers.2.up", "layers.10.up", "norm", "layers.1.up"])
        ['layers.{1,2,10}.up', 'norm']
    """
    numbers_of: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        parts = re.split(r"(\d+)", name)
        numbers_of.setdefault(tuple(parts[::2]), []).append(tuple(map(int, parts[1::2])))
    return [text for pattern, rows in numbers_of.items() for text in _with_ranges(pattern, sorted(rows))]


def _with_ranges(pattern: Sequence[str], rows: Sequence[tuple[int, ...]]) -> list[str]:
    """Return the names with these numbers as one, or each where the numbers are not all combinations of ranges."""
    columns = list(zip(*rows, strict=True))
    distinct = {columns.index(column): dict.fromkeys(column) for column in columns}  # equal ones vary together
    follows_first = all(len(dict.fromkeys(zip(columns[0], column, strict=True))) == len(rows) for column in columns)
    is_complete = prod(len(values) for values in distinct.values()) == len(rows)
    if len(rows) < 2:
        return [_filled(pattern, map(str, row)) for row in rows]
    if not is_complete and not (follows_first and len({*columns[0]}) == len(rows)):
        by_first = {value: [row for row in rows if row[0] == value] for value in dict.fromkeys(columns[0])}
        if 1 < len(by_first) < len(rows):
            return [text for part in by_first.values() for text in _with_ranges(pattern, part)]
        return [_filled(pattern, map(str, row)) for row in rows]
    return [_filled(pattern, [_range(list(dict.fromkeys(column))) for column in columns])]


def _filled(pattern: Sequence[str], values: Iterable[str]) -> str:
    return "".join(text + value for text, value in zip_longest(pattern, values, fillvalue=""))


def _range(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    is_range = list(values) == list(range(values[0], values[0] + len(values)))
    listed = f"{values[0]}-{values[-1]}" if is_range else ",".join(map(str, values[:_RANKS_SHOWN]))
    return "{" + listed + (",..." if not is_range and len(values) > _RANKS_SHOWN else "") + "}"


def ranks(listed: Sequence[int]) -> str:
    """Return `rank 0`, `ranks 0, 1`, or the first few of many."""
    return ("rank " if len(listed) == 1 else "ranks ") + join_truncated([str(rank) for rank in listed], _RANKS_SHOWN)


def ranks_at(where: Mapping[str, Any]) -> str:
    """Return the ranks of a finding, and their nodes where it has them: `rank 1 (node-a), ranks 2, 3 (node-b)`."""
    nodes: Mapping[str, Sequence[int]] = where.get("nodes") or {}
    if not nodes:
        return ranks(where["ranks"])
    return join_truncated([f"{ranks(of_node)} ({name})" for name, of_node in nodes.items()], _RANKS_SHOWN)


def index(position: Any) -> str:
    """Return the index of an element: `[5]`, `[0, 3]`."""
    return str(list(position)) if isinstance(position, (list, tuple)) else f"[{position}]"


def phase(where: Mapping[str, Any]) -> str:
    """Return the phase and step: `backward of step 0`."""
    name, step = where.get("phase"), where.get("step")
    if name is None:
        return "" if step is None else f"step {step}"
    template = _PHASES.get(name, f"{name} of step {{step}}")
    return name if step is None and "{step}" in template else template.format(step=step)


def layout(subject: Mapping[str, Any]) -> list[str]:
    """Return the backend and the topology: `deepspeed`, `tp=2`; without `dp=1` and `zero=0`."""
    zero = subject.get("zero", subject.get("zero_stage"))
    return [
        *([str(subject["backend"])] if subject.get("backend") else []),
        *([f"tp={subject['tp']}"] if "tp" in subject else []),
        *([f"dp={subject['dp']}"] if subject.get("dp", 1) != 1 else []),
        *([f"zero={zero}"] if zero else []),
    ]


_TRAINING = (
    "optimizer",
    "accumulate",
    "loss",
    "attention",
    "experts",
    "checkpointing",
    "reentrant",
    "compile",
    "compile_layers",
    "lora",
    "full",
    "loop",
)


def training(subject: Mapping[str, Any]) -> list[str]:
    """Return how the run trains where that is not the default: `optimizer=adamw`, `accumulate=2`."""
    return [_option(key, subject[key]) for key in _TRAINING if subject.get(key)]


def options(subject: Mapping[str, Any]) -> list[str]:
    """Return every option of the subject that is set, the common ones first."""
    return [
        *layout(subject),
        *([str(subject["dtype"])] if subject.get("dtype") else []),
        *([pluralize(subject["steps"], "step")] if isinstance(subject.get("steps"), int) else []),
        *([f"seed {subject['seed']}"] if "seed" in subject else []),
        *(_option(key, value) for key, value in (subject.get("settings") or {}).items()),
        *(_option(key, value) for key, value in subject.items() if key not in _SUBJECT_PARTS and value),
    ]


def _option(key: str, value: Any) -> str:
    if value is True:
        return key
    value = printable(value)
    if isinstance(value, Mapping):
        text = json.dumps(value)
        return f"{key}={text}" if len(text) <= _LONGEST_OPTION else f"{key} with {len(value)} entries"
    return f"{key}={_plain(value)}"


def name(subject: Mapping[str, Any]) -> str:
    """Return the name of the subject."""
    names = (subject.get(key) for key in ("target", "family", "model", "subject"))
    return str(next(filter(None, names), "model"))


def target_facts(subject: Mapping[str, Any], notes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield what was made small of the user's model, and what of it took no part, each after its label."""
    if "shrunk" in subject:
        yield "model", f"{subject['family']}, with the configuration of {subject['target']}"
    if subject.get("shrunk"):
        yield "shrunk", "; ".join(f"{name} {real} -> {small}" for name, (real, small) in subject["shrunk"].items())
    yield from (("note", text) for text in notes)


def pairs(values: Mapping[str, Any]) -> str:
    """Return evidence by key: `key value, key value`."""
    return ", ".join(f"{key.replace('_', ' ')} {_plain(printable(value))}" for key, value in values.items())


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return "{" + join_truncated([f"{key}: {_plain(inner)}" for key, inner in value.items()], _ENTRIES_SHOWN) + "}"
    if isinstance(value, list):
        return "[" + join_truncated([_plain(inner) for inner in value], _ENTRIES_SHOWN) + "]"
    return str(value)
