"""Faults of the data: the ranks of a TP group get different batches, or data-parallel replicas get the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tpcheck.core.topology import Topology
from tpcheck.lab.faults import pipelines
from tpcheck.lab.faults.pipelines import FIRST_RANDOM

TP = Topology(tp=2)
TP_DP = Topology(tp=2, dp=2)

AGREE = "batches_agree_within_tp"
DIFFER = "batches_differ_across_dp"
ONCE = "samples_come_once"

Build = Callable[..., pipelines.Batches]


@dataclass(frozen=True, slots=True)
class DataFault:
    """A bug of a data pipeline.

    Attributes:
        name: Its slug.
        what: What is wrong, in one sentence.
        build: Returns a rank's batches.
        causes: The right causes; None for a fault without a named cause.
        checks: The checks that may report it.
        fixed: The same pipeline without the fault, a clean control; None where there is none.
        leaf: Path of the leaf that differs first; None for any.
        late: Whether the first batches agree; None for any step, where several batches are needed to rule out chance.
        evidence: Evidence that the finding must have.
        worlds: Topologies in which the fault shows.
        fixed_worlds: Topologies in which `fixed` is clean.
        fixed_dropout: Whether `fixed` is clean although each rank draws from its torch generator after every batch.
        link: An upstream issue that reports such a bug.
        kind: `data`.
    """

    name: str
    what: str
    build: Build
    causes: tuple[str | None, ...]
    checks: tuple[str, ...] = (AGREE,)
    fixed: Build | None = None
    leaf: str | None = None
    late: bool | None = False
    evidence: Mapping[str, Any] = field(default_factory=dict)
    worlds: tuple[Topology, ...] = (TP, TP_DP)
    fixed_worlds: tuple[Topology, ...] = (TP, TP_DP)
    fixed_dropout: bool = True
    link: str | None = None
    kind: str = "data"

    def is_right_place(self, where: Mapping[str, Any], topology: Topology) -> bool:
        """Return whether a finding's `where` names the leaf and the first step that differ."""
        if self.late is not None and where.get("step") != (FIRST_RANDOM // topology.dp if self.late else 0):
            return False
        return self.leaf in (None, where.get("field"))


def _fault(
    name: str, what: str, build: Build, cause: str | None, *, link: str | None = None, **expected: Any
) -> DataFault:
    return DataFault(f"data_{name}", what, build, (cause,), link=link and f"https://github.com/{link}", **expected)


_MAIN: Mapping[str, Any] = {"where": "the main process"}
_WORKERS: Mapping[str, Any] = {"where": "workers"}
_DUPLICATE: Mapping[str, Any] = {"checks": (DIFFER,), "worlds": (TP_DP,), "late": None}
_ONCE: Mapping[str, Any] = {"checks": (ONCE,), "late": None, "leaf": "samples"}
_KINDS = ("torch", "numpy", "python")
_PIXELS: Mapping[str, Any] = {"leaf": "pixel_values", "late": True}
_WORKERS_BY_RANK = "axolotl-ai-cloud/axolotl/pull/3920"

_AUGMENTATIONS = (
    *(
        _fault(
            f"{kind}_in_main_process",
            f"augmentation draws from {kind}, which each rank seeds differently",
            partial(pipelines.augmented, kind=kind),
            f"rng_differs_{kind}",
            fixed=partial(pipelines.augmented, kind=kind, seeded=True),
            fixed_dropout=kind != "torch",
            evidence=_MAIN,
            **_PIXELS,
        )
        for kind in _KINDS
    ),
    *(
        _fault(
            f"{kind}_in_workers",
            f"augmentation in workers draws from {kind}, seeded by world rank",
            partial(pipelines.augmented, kind=kind, workers=2),
            f"rng_differs_{kind}",
            fixed=partial(pipelines.augmented, kind=kind, workers=2, seeded=True),
            evidence=_WORKERS,
            link=_WORKERS_BY_RANK,
            **_PIXELS,
        )
        for kind in _KINDS
    ),
    _fault(
        "generator_that_dropout_moves",
        "augmentation draws from the seeded torch generator that dropout also advances",
        partial(pipelines.augmented, kind="torch", seeded=True),
        "rng_differs_torch",
        evidence=_MAIN,
        link="bigscience-workshop/Megatron-DeepSpeed/pull/276",
        **_PIXELS,
    ),
    _fault(
        "spawned_workers",
        "augmentation in spawned workers is seeded by world rank",
        partial(pipelines.augmented, kind="torch", workers=1, multiprocessing_context="spawn"),
        "rng_differs_torch",
        evidence=_WORKERS,
        worlds=(TP,),
        link=_WORKERS_BY_RANK,
        **_PIXELS,
    ),
    _fault(
        "generator_of_its_own",
        "the data set draws from its own generator, seeded differently on each rank",
        partial(pipelines.with_own_generator, seeded=False),
        "rng_differs_numpy",
        fixed=partial(pipelines.with_own_generator, seeded=True),
        evidence={"generators": ["numpy:dataset.rng"]},
        **_PIXELS,
    ),
    _fault(
        "nested_multimodal",
        "a box inside a nested multimodal batch is drawn independently on each rank",
        partial(pipelines.nested, seeded=False),
        "rng_differs_python",
        fixed=partial(pipelines.nested, seeded=True),
        leaf="images.0.0.box",
        late=True,
        evidence=_MAIN,
    ),
    _fault(
        "masked_language",
        "the collator of a masked language model masks other tokens on each rank",
        partial(pipelines.masked_language, seeded=False),
        "rng_differs_torch",
        fixed=partial(pipelines.masked_language, seeded=True),
        fixed_dropout=False,
        leaf="input_ids",
        evidence=_MAIN,
    ),
    _fault(
        "masked_language_in_workers",
        "the collator of a masked language model masks other tokens in each rank's workers",
        partial(pipelines.masked_language, seeded=False, workers=1),
        "rng_differs_torch",
        fixed=partial(pipelines.masked_language, seeded=True, workers=1),
        leaf="input_ids",
        evidence=_WORKERS,
        link=_WORKERS_BY_RANK,
    ),
)

_ORDERS = (
    _fault(
        "shuffle_without_seed",
        "each rank shuffles with its own seed",
        partial(pipelines.shuffled, seeded=False),
        "same_order_different_seed",
        fixed=partial(pipelines.shuffled, seeded=True),
        fixed_worlds=(TP,),
    ),
    _fault(
        "sampler_seeded_by_rank",
        "DistributedSampler has another seed on each rank of a TP group",
        partial(pipelines.shuffled_by_distributed_sampler, own_seed=True),
        "same_order_different_seed",
        fixed=partial(pipelines.shuffled_by_distributed_sampler, own_seed=False),
        evidence={"sampler_seed": [0, 1]},
    ),
    _fault(
        "sampler_on_world_rank",
        "DistributedSampler deals samples by world rank, also inside a TP group",
        pipelines.sharded_by_world_rank,
        "sampler_sharded_by_world_rank",
    ),
    _fault(
        "stream_by_world_rank",
        "an IterableDataset is split by world rank, also inside a TP group",
        partial(pipelines.stream_by_world_rank, reads_rank=False),
        "sampler_sharded_by_world_rank",
        fixed=partial(pipelines.stream, sharded=True),
        evidence={"attribute": "dataset.replica"},
    ),
    _fault(
        "stream_reads_world_rank",
        "an IterableDataset asks torch.distributed for its rank, also inside a TP group",
        partial(pipelines.stream_by_world_rank, reads_rank=True),
        "sampler_sharded_by_world_rank",
        evidence={"iterable": True},
    ),
    _fault(
        "stream_by_variables",
        "an IterableDataset is split by variables of the script that hold the world rank and size",
        pipelines.stream_by_variables,
        "sampler_sharded_by_world_rank",
        evidence={"attribute": "dataset.world_rank"},
    ),
    _fault(
        "accelerate_shuffle",
        "accelerate leaves an unseeded shuffle as it is under pure TP",
        pipelines.accelerated_images,
        "same_order_different_seed",
        fixed=pipelines.accelerated_images,
        worlds=(TP,),
        fixed_worlds=(TP_DP,),
    ),
    _fault(
        "accelerate_device_specific_seed",
        "accelerate's set_seed(device_specific=True) seeds the ranks of a TP group differently",
        partial(pipelines.accelerated_images, device_specific=True),
        "same_order_different_seed",
        fixed=partial(pipelines.accelerated_images, device_specific=False),
        worlds=(TP,),
    ),
    _fault(
        "accelerate_before_mesh",
        "accelerate prepared the loader before there was a device mesh",
        partial(pipelines.accelerated_images, mesh=False),
        "sampler_sharded_by_world_rank",
    ),
    _fault(
        "listed_files",
        "files come in the order of a directory, which differs between hosts",
        partial(pipelines.listed, ordered=False),
        "order_differs",
        fixed=partial(pipelines.listed, ordered=True),
        late=True,
    ),
    _fault(
        "images_reordered",
        "one rank of a TP group has the images of a batch in another order",
        pipelines.reordered_images,
        "order_differs",
    ),
    _fault(
        "uneven",
        "one rank of a TP group has fewer samples",
        pipelines.uneven,
        "uneven_length",
        late=None,
    ),
)

_REPLICAS = (
    _fault(
        "no_sampler",
        "there is no sampler: replicas train on the same samples",
        pipelines.same_for_all,
        "duplicate_dp_batch",
        **_DUPLICATE,
    ),
    _fault(
        "stream_from_its_beginning",
        "every replica reads a stream from its beginning",
        partial(pipelines.stream, sharded=False),
        "duplicate_dp_batch",
        fixed=partial(pipelines.stream, sharded=True),
        evidence={"iterable": True},
        link="openvla/openvla/issues/109",
        **_DUPLICATE,
    ),
    _fault(
        "accelerate_stream",
        "accelerate dispatches one batch of a stream to all replicas",
        pipelines.accelerated_stream,
        "duplicate_dp_batch",
        fixed=pipelines.accelerated_stream,
        fixed_worlds=(TP,),
        evidence={"dispatch_batches": True},
        link="huggingface/accelerate/issues/2162",
        **_DUPLICATE,
    ),
    _fault(
        "accelerate_dispatched",
        "accelerate dispatches one batch to all replicas",
        partial(pipelines.accelerated_images, device_specific=False, dispatch_batches=True),
        "duplicate_dp_batch",
        evidence={"dispatch_batches": True},
        **_DUPLICATE,
    ),
)

_OVER_STEPS = (
    _fault(
        "workers_repeat_stream",
        "each worker yields all of an IterableDataset",
        partial(pipelines.stream_in_workers, split=False),
        "samples_repeated",
        fixed=partial(pipelines.stream_in_workers, split=True),
        evidence={"workers": [0, 1]},
        **_ONCE,
    ),
    _fault(
        "workers_repeat_shuffled_stream",
        "each worker shuffles and yields all of an IterableDataset",
        partial(pipelines.stream_in_workers, split=False, shuffled=True),
        "samples_repeated",
        fixed=partial(pipelines.stream_in_workers, split=True, shuffled=True),
        evidence={"workers": [0, 1]},
        worlds=(TP,),
        fixed_worlds=(TP,),
        **_ONCE,
    ),
    _fault(
        "loader_goes_back",
        "the loader gives its last two batches again, and goes on",
        pipelines.going_back,
        "samples_repeated",
        fixed=partial(pipelines.going_back, at=8, back=8),
        **_ONCE,
    ),
    _fault(
        "sampler_goes_back",
        "the sampler goes back by two batches, whose images are then augmented in another way",
        partial(pipelines.in_order, parts=(range(10), range(6, 16))),
        "samples_repeated",
        fixed=pipelines.with_replacement,
        fixed_worlds=(TP,),
        evidence={"equal": "sample indices"},
        worlds=(TP,),
        **_ONCE,
    ),
    _fault(
        "sampler_leaves_out",
        "the sampler leaves out two batches of its order",
        partial(pipelines.in_order, parts=(range(6), range(10, 16))),
        "samples_skipped",
        fixed=partial(pipelines.in_order, parts=(range(6, 16),)),
        fixed_worlds=(TP,),
        worlds=(TP,),
        **_ONCE,
    ),
)

_CONTENTS = (
    _fault(
        "padding_multiple",
        "ranks of a TP group pad to different multiples",
        partial(pipelines.padded, multiples=(8, 16)),
        "padding_differs",
        fixed=partial(pipelines.padded, multiples=(8, 8)),
    ),
    _fault(
        "padding_side",
        "ranks of a TP group pad on different sides",
        partial(pipelines.padded, multiples=(8, 8), sides=("left", "right")),
        "padding_differs",
    ),
    _fault(
        "padded_images",
        "ranks of a TP group pad images to different sizes",
        pipelines.padded_images,
        "padding_differs",
    ),
    *(
        _fault(f"{name}_alone", what, partial(pipelines.altered, change=name), None, leaf=leaf, late=True)
        for name, what, leaf in (
            ("labels", "the labels alone differ on one rank", "labels"),
            ("dtype", "the dtype of the labels alone differs on one rank", "labels"),
            ("one_bit", "one bit of the pixels differs on one rank", "pixel_values"),
        )
    ),
)

FAULTS: tuple[DataFault, ...] = (*_AUGMENTATIONS, *_ORDERS, *_REPLICAS, *_OVER_STEPS, *_CONTENTS)
