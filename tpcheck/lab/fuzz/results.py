"""What a search among many configurations, and one try of a layer, came to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from tpcheck.core.errors import UsageError

STRIDES = ("contiguous", "transposed", "sliced", "expanded")
MAKING = "making the layer"  # the phase of a try in which a layer may refuse
DTYPES = ("float64", "float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Trial:
    """A layer, what it is given, and how that lies in memory.

    Attributes:
        layer: Name of the kind of layer.
        inputs, outputs: Its widths; those of one block, where a weight is fused of several. Of an embedding, the
            number of its rows and their width.
        rows: The dims before the last one.
        strides, gradient_strides: How the input and the gradient of the output lie in memory: `contiguous`,
            `transposed` (the last two dims change places), `sliced` (every other element of a wider tensor), or
            `expanded` (one number everywhere, as the gradient of a sum).
        options: Settings of the backend's layers.
    """

    layer: str
    tp: int = 2
    inputs: int = 1
    outputs: int = 1
    rows: tuple[int, ...] = (1,)
    bias: bool = False
    dtype: str = "float64"
    strides: str = "contiguous"
    gradient_strides: str = "contiguous"
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return what differs from the defaults.

        Example:
            >>> Trial("LinearLayer", rows=(2, 3), bias=True).to_json()
            '{"layer": "LinearLayer", "rows": [2, 3], "bias": true}'
        """
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        plain = Trial(self.layer)
        return json.dumps(
            {name: value for name, value in values.items() if name == "layer" or value != getattr(plain, name)}
        )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Trial:
        """Return the trial that `to_json` has written.

        Raises:
            UsageError: There is no layer, an unknown key, or a value of another kind.
        """
        known = [one.name for one in fields(cls)]
        for name in ("layer", *values):
            if name not in known or name not in values:
                raise UsageError("trial", name, known)
        rows = values.get("rows", [1])
        sizes = {
            "rows": rows,
            **{name: [values.get(name, 2 if name == "tp" else 1)] for name in ("tp", "inputs", "outputs")},
        }
        for name, numbers in sizes.items():
            if not isinstance(numbers, list) or not numbers or not all(_is_size(number) for number in numbers):
                raise UsageError(f"trial.{name}", values.get(name), "positive integers")
        for name, accepted in (("strides", STRIDES), ("gradient_strides", STRIDES), ("dtype", DTYPES)):
            if values.get(name, accepted[0]) not in accepted:
                raise UsageError(f"trial.{name}", values[name], accepted)
        return cls(**{**values, "rows": tuple(rows)})


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


Status = Literal["passed", "refused", "known", "failed", "error"]
BAD: tuple[Status, ...] = ("failed", "error")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one example ended.

    Attributes:
        status: `passed`; `refused` (it cannot be run, and somebody said so); `known` (a registered upstream bug);
            `failed` (something differs); `error` (a crash that is no refusal).
        kind: Failures of one kind are shrunk together; of what is known, the name of the bug.
        reason: Why it was refused, or what was found, in a line.
        command: Repeats the example.
        data: What there is to show of a failure.
    """

    status: Status
    kind: str = ""
    reason: str = ""
    command: str = ""
    data: Any = None

    @property
    def is_bad(self) -> bool:
        return self.status in BAD


@dataclass(frozen=True, slots=True)
class Found:
    """The smallest example of one kind of failure.

    Attributes:
        outcome: How it ended.
        again: How it ended when it was run once more: only what comes again can be looked into.
        shrunk_from: The command of the first example that failed in this way.
    """

    outcome: Outcome
    again: Outcome
    shrunk_from: str = ""

    @property
    def comes_again(self) -> bool:
        return self.again.status == self.outcome.status


@dataclass(frozen=True, slots=True)
class Searched:
    """All examples of one search.

    Attributes:
        subject: What was searched, and within which bounds.
        outcomes: How each distinct example ended, in the order in which they were run; those that were run to shrink a
            failure left out.
        found: The smallest example of each kind of failure.
        num_shrinking: How many more were run to shrink.
        cut_short: Shrinking ended at its limit of time: a smaller example may exist.
        interrupted: Ctrl-C ended the search.
        environment: Versions by package.
    """

    subject: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]
    found: tuple[Found, ...] = ()
    num_shrinking: int = 0
    cut_short: bool = False
    interrupted: bool = False
    seconds: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)

    def count(self, *statuses: Status) -> int:
        return sum(outcome.status in statuses for outcome in self.outcomes)

    @property
    def num_ran(self) -> int:
        return len(self.outcomes) - self.count("refused")

    def reasons(self, status: Status) -> list[tuple[str, int]]:
        """Return what is said of the outcomes of this status, the most frequent first, and how often."""
        said = Counter(
            outcome.kind if status == "known" else outcome.reason
            for outcome in self.outcomes
            if outcome.status == status
        )
        return said.most_common()

    @property
    def verdict(self) -> Literal["passed", "failed", "error", "skipped"]:
        """Return what the search says in a word; `skipped` where nothing could be run."""
        statuses = {found.outcome.status for found in self.found}
        if "failed" in statuses:
            return "failed"
        if "error" in statuses:
            return "error"
        return "passed" if self.num_ran else "skipped"
