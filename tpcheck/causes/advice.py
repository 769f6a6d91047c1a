"""What to change for each cause of wrong batches, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpcheck.topology import Topology

_SEED = {
    "python": "random.seed(seed + dp_rank)",
    "numpy": "np.random.seed(seed + dp_rank)",
    "torch": "torch.manual_seed(seed + dp_rank)",
    "cuda": "torch.cuda.manual_seed(seed + dp_rank)",
}


def advice_for(cause: str, evidence: Mapping[str, Any], topology: Topology) -> str:
    """Return one sentence that says what to change."""
    if cause.startswith("rng_differs_"):
        return _generators(cause.removeprefix("rng_differs_"), evidence)
    if cause == "duplicate_dp_batch":
        return _duplicates(evidence, topology)
    if cause == "order_differs" and evidence.get("hash_differs"):
        return "Sort what comes out of a set before it is used, or set PYTHONHASHSEED to one value on all ranks."
    return _ADVICE[cause].format(dp=topology.dp)


_ADVICE = {
    "sampler_sharded_by_world_rank": "Build the sampler with num_replicas={dp} and rank=dp_rank; with accelerate, "
    "prepare the loader after the engine's device mesh exists (`prepare`, not `prepare_data_loader` before it).",
    "same_order_different_seed": "Give the sampler one seed on all ranks: `RandomSampler(dataset, "
    "generator=torch.Generator().manual_seed(seed))`, and the same `set_epoch` on all.",
    "padding_differs": "Pad to a length that every rank of the TP group knows: padding='max_length' or one "
    "pad_to_multiple_of, one padding side and one padding token on all of them.",
    "order_differs": "Sort file names and other listings before they are indexed: `sorted(os.listdir(...))`.",
    "uneven_length": "Give every rank of a TP group the same samples, and drop the last incomplete batch on all.",
}


CAUSES = frozenset({*_ADVICE, "duplicate_dp_batch", *(f"rng_differs_{kind}" for kind in _SEED)})


def _generators(kind: str, evidence: Mapping[str, Any]) -> str:
    own = next((name.partition(":")[2] for name in evidence["generators"][:1] if ":" in name), None)
    if own is not None:
        return f"Seed {own} from seed + dp_rank, which all ranks of a TP group share."
    if evidence["where"] == "workers":
        return (
            f"Seed workers by dp_rank, not by rank: a worker_init_fn that calls `{_SEED[kind]}`, and "
            "`generator=torch.Generator().manual_seed(seed + dp_rank)` for the loader."
        )
    if kind == "torch":
        return (
            "Draw from a generator of its own, `torch.Generator().manual_seed(seed + dp_rank)`: dropout moves the "
            "global one on each rank by itself."
        )
    return f"Call `{_SEED[kind]}` on every rank before the loader is iterated, or draw from a generator seeded so."


def _duplicates(evidence: Mapping[str, Any], topology: Topology) -> str:
    if evidence.get("dispatch_batches") is True:
        return "Pass dispatch_batches=False, and give each replica its own samples by dp_rank: one batch goes to all."
    if evidence.get("iterable") is True:
        return f"Shard the IterableDataset: sample i belongs to replica i % {topology.dp} == dp_rank."
    return f"Build the sampler with num_replicas={topology.dp}, rank=dp_rank, and one seed on all replicas."
