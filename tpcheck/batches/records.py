"""What one rank got from its data loader at one step, small enough to be sent to every other rank."""

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
        kind: `tensor`, `array` (NumPy), `value` (number, text, None) or `opaque` (an object whose parts are unknown).
        dtype: Dtype of a tensor or array, type name of anything else.
        shape: Shape of a tensor or array, number of parts of a container; empty for anything else.
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
class ContentDigests:
    """Digests of one tensor that are equal on ranks that have the same samples in it; None where they do not apply.

    Attributes:
        rows: Of the rows, in any order.
        unpadded: Of the tensor cut to the smallest size on any rank in every dim but the first, where what is cut off
            is one value (at the end or at the start).
        unmasked: Of what the attention mask beside it keeps.
    """

    rows: str
    unpadded: str | None = None
    unmasked: str | None = None


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """One rank's batch at one step.

    Attributes:
        leaves: Every leaf, in the order of the structure.
        rows: Digests of the samples, where replicas are compared.
        contents: By path, of the leaves that differ.
        rng: Digest of the state of each random generator before the batch was made, by name: `python`, `numpy`,
            `torch`, `cuda`, and `worker3.python` and so on for those of a loader's workers.
        loader: What is known of the loader and of this batch: see `tpcheck.batches.provenance.loader_facts`.
    """

    leaves: tuple[Leaf, ...] = ()
    rows: tuple[str, ...] = ()
    contents: Mapping[str, ContentDigests] = field(default_factory=dict)
    rng: Mapping[str, str] = field(default_factory=dict)
    loader: Mapping[str, Any] = field(default_factory=dict)
