"""A tensor that failed a check, with the numbers that a cause can be tested on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Tensor = Any  # a torch.Tensor; this layer does not import torch

Kind = Literal["activation", "input_gradient", "gradient", "weight", "update", "norm", "replica", "group", "sharding"]


@dataclass(frozen=True, slots=True)
class Mistaken:
    """What each rank's part of a tensor would be under a mistake.

    Attributes:
        cause: Slug of the mistake.
        parts: By tp_rank.
        evidence: What more there is to say of it, by name.
    """

    cause: str
    parts: tuple[Tensor, ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Suspect:
    """A failed comparison before its cause is looked for.

    Attributes:
        check, where, observed, allowed, evidence: As in `Finding`.
        kind: What sort of tensor this is.
        expected: The reference's whole tensor, where there is one.
        parts: Each rank's part, by tp_rank.
        expected_parts: What each rank's part should be, by tp_rank; empty where that cannot be said.
        replicated: Whether every rank should hold the whole tensor.
        allowed_error: Largest absolute Frobenius error that passes.
        num_replicas: How many data-parallel replicas there are.
        actual: What the ranks' parts make up, where a layout tells.
        others: Other tensors of the reference of this kind, by name: each whole, then what each rank should hold of it.
        mistaken: What the parts would be under mistakes that only the check knows enough of to work out.
    """

    check: str
    where: Mapping[str, Any]
    observed: float
    allowed: float
    kind: Kind
    evidence: Mapping[str, Any] = field(default_factory=dict)
    expected: Tensor = None
    parts: tuple[Tensor, ...] = ()
    expected_parts: tuple[Tensor, ...] = ()
    replicated: bool = False
    allowed_error: float = 0.0
    num_replicas: int = 1
    actual: Tensor = None
    others: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    mistaken: tuple[Mistaken, ...] = ()
