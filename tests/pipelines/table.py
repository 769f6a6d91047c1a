"""Pipelines as people build them, each with what tpcheck should say of it. A pipeline is a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.pipelines import build
from tpcheck import Topology

TP = Topology(tp=2)
TP_DP = Topology(tp=2, dp=2)
BOTH = (TP, TP_DP)

AGREE = "batches_agree_within_tp"
DIFFER = "batches_differ_across_dp"


@dataclass(frozen=True)
class Pipeline:
    """One way to build the batches, and the finding that it should lead to.

    Attributes:
        name: Of the row.
        build: Returns a rank's batches.
        check: Check that fails, or None where nothing should be found.
        cause: Slug, or None where no cause can be told.
        leaf: Path of the leaf that differs first.
        late: Whether the first batches agree.
        evidence: Part of the evidence.
        worlds: Topologies that it is run on.
        dropout: Whether the loop draws from each rank's torch generator after every batch, on each rank another number.
    """

    name: str
    build: Callable[..., build.Batches]
    check: str | None = None
    cause: str | None = None
    leaf: str | None = None
    late: bool = False
    evidence: Mapping[str, Any] = field(default_factory=dict)
    worlds: tuple[Topology, ...] = BOTH
    dropout: bool = True


def wrong(name: str, build: Any, cause: str | None, *, check: str = AGREE, **expected: Any) -> Pipeline:
    return Pipeline(name, build, check, cause, **expected)


def clean(name: str, build: Any, **expected: Any) -> Pipeline:
    return Pipeline(f"clean, {name}", build, **expected)


MAIN, WORKERS = {"where": "the main process"}, {"where": "workers"}
KINDS = ("torch", "numpy", "python")

AUGMENTATIONS = [
    row
    for kind in KINDS
    for row in (
        wrong(
            f"augmentation by {kind} in the main process",
            partial(build.augmented, kind=kind),
            f"rng_differs_{kind}",
            leaf="pixel_values",
            late=True,
            evidence=MAIN,
        ),
        wrong(
            f"augmentation by {kind} in workers",
            partial(build.augmented, kind=kind, workers=2),
            f"rng_differs_{kind}",
            leaf="pixel_values",
            late=True,
            evidence=WORKERS,
        ),
        clean(
            f"augmentation by {kind}, seeded",
            partial(build.augmented, kind=kind, seeded=True),
            dropout=kind != "torch",
        ),
        clean(
            f"augmentation by {kind} in workers, seeded", partial(build.augmented, kind=kind, workers=2, seeded=True)
        ),
    )
] + [
    wrong(
        "augmentation by torch, seeded, from the generator that dropout moves",
        partial(build.augmented, kind="torch", seeded=True),
        "rng_differs_torch",
        leaf="pixel_values",
        late=True,
        evidence=MAIN,
    ),
    wrong(
        "augmentation in spawned workers",
        partial(build.augmented, kind="torch", workers=1, multiprocessing_context="spawn"),
        "rng_differs_torch",
        leaf="pixel_values",
        late=True,
        evidence=WORKERS,
        worlds=(TP,),
    ),
    wrong(
        "augmentation by a generator of the data set's own",
        partial(build.with_own_generator, seeded=False),
        "rng_differs_numpy",
        leaf="pixel_values",
        late=True,
        evidence={"generators": ["numpy:dataset.rng"]},
    ),
    clean("generator of the data set's own, seeded", partial(build.with_own_generator, seeded=True)),
    wrong(
        "nested multimodal batch",
        partial(build.nested, seeded=False),
        "rng_differs_python",
        leaf="images.0.0.box",
        late=True,
        evidence=MAIN,
    ),
    clean("nested multimodal batch, seeded", partial(build.nested, seeded=True)),
    wrong(
        "masked language model collator",
        partial(build.masked_language, seeded=False),
        "rng_differs_torch",
        leaf="input_ids",
        evidence=MAIN,
    ),
    wrong(
        "masked language model collator in workers",
        partial(build.masked_language, seeded=False, workers=1),
        "rng_differs_torch",
        leaf="input_ids",
        evidence=WORKERS,
    ),
    clean("masked language model collator, seeded", partial(build.masked_language, seeded=True), dropout=False),
    clean("masked language model collator in workers, seeded", partial(build.masked_language, seeded=True, workers=1)),
]

ORDERS = [
    wrong("shuffle without a seed", partial(build.shuffled, seeded=False), "same_order_different_seed"),
    clean("shuffle, seeded", partial(build.shuffled, seeded=True), worlds=(TP,)),
    wrong(
        "DistributedSampler with a seed of each rank",
        partial(build.shuffled_by_distributed_sampler, own_seed=True),
        "same_order_different_seed",
        evidence={"sampler_seed": [0, 1]},
    ),
    clean("DistributedSampler of replicas", partial(build.shuffled_by_distributed_sampler, own_seed=False)),
    wrong("DistributedSampler on the world rank", build.sharded_by_world_rank, "sampler_sharded_by_world_rank"),
    wrong(
        "accelerate, shuffle without a seed under pure TP",
        build.accelerated_images,
        "same_order_different_seed",
        worlds=(TP,),
    ),
    clean("accelerate, shuffle under TP and DP", build.accelerated_images, worlds=(TP_DP,)),
    wrong(
        "accelerate, set_seed(device_specific=True)",
        partial(build.accelerated_images, device_specific=True),
        "same_order_different_seed",
        worlds=(TP,),
    ),
    clean("accelerate, set_seed", partial(build.accelerated_images, device_specific=False)),
    wrong(
        "accelerate, prepared before there is a mesh",
        partial(build.accelerated_images, mesh=False),
        "sampler_sharded_by_world_rank",
    ),
    wrong("files in the order of a directory", partial(build.listed, ordered=False), "order_differs", late=True),
    clean("files in the order of their names", partial(build.listed, ordered=True)),
    wrong("another number of samples on each rank", build.uneven, "uneven_length"),
]

REPLICAS = [
    wrong(name, function, "duplicate_dp_batch", check=DIFFER, worlds=(TP_DP,), evidence=evidence)
    for name, function, evidence in (
        ("no sampler for replicas", build.same_for_all, {}),
        ("stream that every rank reads from its beginning", partial(build.stream, sharded=False), {"iterable": True}),
        ("accelerate, stream", build.accelerated_stream, {"dispatch_batches": True}),
        (
            "accelerate, dispatched batches",
            partial(build.accelerated_images, device_specific=False, dispatch_batches=True),
            {"dispatch_batches": True},
        ),
    )
] + [
    clean("stream, sharded", partial(build.stream, sharded=True)),
    clean("accelerate, stream, sharded", partial(build.accelerated_stream, sharded=True), worlds=(TP,)),
    clean("accelerate, stream under pure TP", build.accelerated_stream, worlds=(TP,)),
]

CONTENTS = [
    wrong("padding to another multiple", partial(build.padded, multiples=(8, 16)), "padding_differs"),
    wrong(
        "padding on another side",
        partial(build.padded, multiples=(8, 8), sides=("left", "right")),
        "padding_differs",
    ),
    wrong("images padded to another size, as arrays", build.padded_images, "padding_differs"),
    wrong("images in another order, as arrays", build.reordered_images, "order_differs"),
    clean("padding, the same on all ranks", partial(build.padded, multiples=(8, 8))),
    wrong("labels alone differ", partial(build.altered, change="labels"), None, leaf="labels", late=True),
    wrong("dtype alone differs", partial(build.altered, change="dtype"), None, leaf="labels", late=True),
    wrong("one bit differs", partial(build.altered, change="one_bit"), None, leaf="pixel_values", late=True),
    clean("NaN, empty tensors, no samples", build.odd_but_equal),
]

PIPELINES = [*AUGMENTATIONS, *ORDERS, *REPLICAS, *CONTENTS]
