"""What one rank got from its data loader at one step, small enough to send to every other rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

LeafKind = Literal["tensor", "array", "value", "opaque"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of a batch: a tensor, an array, or a plain value.

    Attributes:
        path: Place in the batch, such as `pixel_values` or `images.0.boxes`.
        kind: `tensor`, `array` (NumPy), `value` (number, text, None) or `opaque` (an object that cannot
            be looked into).
        dtype: Dtype of a tensor or array, type name of anything else.
        shape: Shape of a tensor or array; empty for anything else.
        device: Device type and index of a tensor; empty for anything else.
        digest: Digest of the bits.
    """

    path: str
    kind: LeafKind
    dtype: str
    shape: tuple[int, ...]
    device: str
    digest: str


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """One rank's batch at one step.

    Attributes:
        step: How many batches came before.
        ended: The loader has no further batch; there are no leaves.
        leaves: Every leaf, in the order of the structure.
        rows: Digests of sampled rows (first dim) of the largest leaf, to tell replicas that train on the same samples.
        rng: Digest of the state of each random generator when the batch was asked for, by name: `python`, `numpy`,
            `torch`, `cuda`, and `worker3.python` and so on for those of a loader's workers.
        loader: What is known of the loader: sampler class, seed, `num_replicas`, `rank`, worker seeds, hash seed.
    """

    step: int
    ended: bool = False
    leaves: tuple[Leaf, ...] = ()
    rows: tuple[str, ...] = ()
    rng: Mapping[str, str] = field(default_factory=dict)
    loader: Mapping[str, Any] = field(default_factory=dict)
