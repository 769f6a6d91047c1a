"""One try of one tensor-parallel layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tpcheck.errors import UsageError

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
