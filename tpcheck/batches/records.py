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
class LoaderFacts:
    """What one rank knows of its loader and of how one batch was made; None where it does not apply or is unknown.

    The names are those of the evidence in a finding.

    Attributes:
        dataset, sampler: Class names of the innermost ones.
        iterable: Whether the dataset is an IterableDataset.
        num_replicas, rank: For which of how many replicas the sampler (or accelerate's shard of a stream) is.
        shuffle, sampler_seed, epoch: Of the sampler.
        replacement: Whether the sampler draws with replacement.
        generator_seed: Of the sampler's torch generator.
        numbers: Integers in attributes of dataset, samplers and loader, such as `dataset.rank`.
        reads_rank: Whether the dataset asks for the world rank and the world size while it is read.
        dispatch_batches: Whether accelerate reads batches on one process for all.
        worker_init_fn: Name and arguments.
        PYTHONHASHSEED: Of the environment.
        hash: Hash of one text in this process.
        listing: By attribute of the dataset that lists names: digests of the names in order, and of the sorted names.
        indices, indices_digest, indices_sorted: Sample indices (or a digest of many), and a digest of the sorted ones.
        drew: Generators that moved while the batch was made.
        sampler_drew, sampler_rng: Generators that moved in the sampler, and digests of their states before that.
        worker_seed: Seed that torch gave to the worker that made the batch.
    """

    dataset: str | None = None
    iterable: bool | None = None
    sampler: str | None = None
    num_replicas: int | None = None
    rank: int | None = None
    shuffle: Any = None
    sampler_seed: Any = None
    epoch: Any = None
    replacement: bool | None = None
    generator_seed: int | None = None
    numbers: Mapping[str, int] | None = None
    reads_rank: bool | None = None
    dispatch_batches: bool | None = None
    worker_init_fn: str | None = None
    PYTHONHASHSEED: str | None = None
    hash: str | None = None
    listing: Mapping[str, tuple[str, str]] | None = None
    indices: tuple[Any, ...] | None = None
    indices_digest: str | None = None
    indices_sorted: str | None = None
    drew: tuple[str, ...] = ()
    sampler_drew: tuple[str, ...] = ()
    sampler_rng: Mapping[str, str] = field(default_factory=dict)
    worker_seed: int | None = None


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """One rank's batch at one step.

    Attributes:
        leaves: Every leaf, in the order of the structure.
        rows: Digests of the samples.
        contents: By path, of the leaves that differ.
        rng: Digest of the state of each random generator before the batch was made, by name: `python`, `numpy`,
            `torch`, `cuda`, and `worker3.python` and so on for those of a loader's workers.
        loader: What is known of the loader and of how the batch was made.
    """

    leaves: tuple[Leaf, ...] = ()
    rows: tuple[int, ...] = ()
    contents: Mapping[str, ContentDigests] = field(default_factory=dict)
    rng: Mapping[str, str] = field(default_factory=dict)
    loader: LoaderFacts = field(default_factory=LoaderFacts)
