"""Trials of layers, and the outcomes of examples and searches."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from tpcheck.core.errors import UsageError
from tpcheck.families.rules import is_size

STRIDES = ("contiguous", "transposed", "sliced", "expanded")
MAKING = "making the layer"  # the phase of a trial in which a layer may refuse
OUTPUT, INPUT_GRADIENT = "output", "gradient of the input"  # tensors of a trial
DTYPES = ("float64", "float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Trial:
    """A layer, the shapes of its tensors, and their memory layout.

    Attributes:
        layer: Name of the kind of layer.
        inputs, outputs: Its widths, or those of one block of a fused weight; number and width of the rows of an
            embedding.
        rows: The dims before the last one.
        strides, gradient_strides: Memory layout of the input and of the gradient of the output: `contiguous`,
            `transposed` (in the last two dims), `sliced` (every other element of a wider tensor), or `expanded` (one
            number everywhere, as the gradient of a sum).
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
        """Return the values that differ from the defaults.

        Example:
            >>> Trial("LinearLayer", rows=(2, 3), bias=True).to_json()
            '{"layer": "LinearLayer", "rows": [2, 3], "bias": true}'
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = Trial(self.layer)
        return json.dumps(
            {name: value for name, value in values.items() if name == "layer" or value != getattr(defaults, name)}
        )

    @classmethod
    def parse(cls, text: str) -> Trial:
        """Return the trial in the text of `--trial`.

        Raises:
            UsageError: The text is no valid trial.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UsageError("trial", text, f"a JSON object ({error})") from error
        if not isinstance(values, dict):
            raise UsageError("trial", text, "a JSON object")
        return cls.of(values)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Trial:
        """Return the trial that `to_json` has written.

        Raises:
            UsageError: The layer is missing, a key is unknown, or a value has the wrong type.
        """
        known = [field.name for field in fields(cls)]
        for name in ("layer", *values):
            if name not in known or name not in values:
                raise UsageError("trial", name, known)
        rows = values.get("rows", [1])
        sizes = {
            "rows": rows,
            **{name: [values.get(name, 2 if name == "tp" else 1)] for name in ("tp", "inputs", "outputs")},
        }
        for name, numbers in sizes.items():
            if not isinstance(numbers, list) or not numbers or not all(is_size(number) for number in numbers):
                raise UsageError(f"trial.{name}", values.get(name), "positive integers")
        for name, accepted in (("strides", STRIDES), ("gradient_strides", STRIDES), ("dtype", DTYPES)):
            if values.get(name, accepted[0]) not in accepted:
                raise UsageError(f"trial.{name}", values[name], accepted)
        return cls(**{**values, "rows": tuple(rows)})


REFUSALS = ("AssertionError", "NotImplementedError", "ValueError")
"""The exceptions of a deliberate refusal; any other exception is a crash."""

_MESSAGE_OF_KIND = 60  # characters of a message that distinguish one kind of crash from another


def in_general(message: str) -> str:
    """Return the first line of a message with its numbers replaced by N, to count similar messages together.

    Example:
        >>> in_general("shape [3, 4] is invalid\\n at line 7")
        'shape [N, N] is invalid'
    """
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return re.sub(r"\d+", "N", line)


def crash_kind(where: str, message: str) -> str:
    """Return the kind of failure that a crash is: its place and the start of its message, in general."""
    return f"{where} {in_general(message)[:_MESSAGE_OF_KIND]}"


Status = Literal["passed", "refused", "known", "failed", "error"]
BAD: tuple[Status, ...] = ("failed", "error")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one example ended.

    Attributes:
        status: `passed`; `refused` (the model or the backend refuses the configuration with a reason); `known` (a
            registered upstream bug); `failed` (a tensor differs); `error` (a crash).
        kind: Failures of one kind are shrunk together; for `known` the name of the bug.
        reason: The reason of a refusal, or a line about the failure.
        command: Reproduces the example.
        data: The verdict, or other data about a failure.
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
class ShrunkFailure:
    """The smallest example of one kind of failure.

    Attributes:
        outcome: Its outcome.
        again: Its outcome when it was run once more.
        shrunk_from: The command of the first example with this failure.
    """

    outcome: Outcome
    again: Outcome
    shrunk_from: str = ""

    @property
    def is_reproducible(self) -> bool:
        return self.again.status == self.outcome.status


@dataclass(frozen=True, slots=True)
class SearchResult:
    """All examples of one search.

    Attributes:
        subject: The family or layer, and the bounds of the search.
        outcomes: The outcome of each distinct example in order, without those that were run to shrink a failure.
        found: The smallest example of each kind of failure.
        num_shrinking: Number of examples that were run to shrink.
        cut_short: Shrinking reached its time limit: a smaller example may exist.
        interrupted: Ctrl-C ended the search.
        environment: Versions by package.
    """

    subject: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]
    found: tuple[ShrunkFailure, ...] = ()
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
        """Return the reasons of the outcomes with this status and their counts, the most frequent first."""
        counts = Counter(
            outcome.kind if status == "known" else outcome.reason
            for outcome in self.outcomes
            if outcome.status == status
        )
        return counts.most_common()

    @property
    def verdict(self) -> Literal["passed", "failed", "error", "skipped"]:
        """Return the verdict of the search; `skipped` if no example could be run."""
        statuses = {found.outcome.status for found in self.found}
        if "failed" in statuses:
            return "failed"
        if "error" in statuses:
            return "error"
        return "passed" if self.num_ran else "skipped"
