"""What is known of a data loader: who samples, with which seed, for which of how many replicas, in which workers."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
import xxhash
from torch.utils.data import IterableDataset

from tpcheck.collect.listening import Made
from tpcheck.collect.observation import Observation, observe_workers
from tpcheck.collect.unwrap import datasets, loaders, samplers, torch_loader, vars_of

__all__ = ["Made", "Observation", "all_facts", "loader_facts", "made_facts", "observe_workers"]

_MOST_INDICES = 64  # sample indices of a batch that travel one by one; longer ones as a digest
_MOST_NAMES = 1_000_000  # entries of a dataset's listing


def all_facts(loader: Any, made: Made) -> dict[str, Any]:
    """Return what is known of a loader and of one batch that it made."""
    return loader_facts(loader) | made_facts(made)


def loader_facts(loader: Any) -> dict[str, Any]:
    """Return what can be told of any iterable of batches; keys that do not apply are absent. Pickles, and is small.

    Meant for the moment when batches differ: a dataset's listing of files is read from end to end.

    Keys: `loader`, `dataset`, `iterable`, `sampler`, `num_replicas`, `rank`, `shuffle`, `sampler_seed`,
    `generator_seed`, `epoch`, `length`, `batch_size`, `drop_last`, `dispatch_batches`, `num_workers`,
    `worker_init_fn`, `start_method`, `torch_seed`, `PYTHONHASHSEED`, `hash`, `listing` (attribute of the dataset, with
    digests of its names in order and of the same names sorted).
    """
    inner = torch_loader(loader)
    facts: dict[str, Any] = {
        "loader": type(loader).__name__,
        "torch_seed": torch.initial_seed(),
        "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "unset"),
        "hash": f"{hash('tpcheck') & (1 << 64) - 1:016x}",
    }
    with suppress(Exception):  # any class of a user's may stand here, and its __len__ may raise anything
        facts["length"] = len(loader)
    source = inner if inner is not None else loader
    facts |= _of_dataset(source)
    facts |= _of_sampling(source)
    if inner is not None:
        facts |= _of_workers(inner)
        facts["drop_last"] = bool(inner.drop_last)
    facts["dispatch_batches"] = any(type(each).__name__ == "DataLoaderDispatcher" for each in loaders(loader))
    return facts


def made_facts(made: Made) -> dict[str, Any]:
    """Return what an observation knows of one batch, besides the states: to be merged with `loader_facts`.

    Keys: `indices` (of the samples) or `indices_digest`, `drew`, `exact`, `sampler_drew`, `sampler_rng`, `worker_seed`.
    """
    facts: dict[str, Any] = {"drew": made.drew, "exact": made.exact}
    if made.indices is not None:
        few = len(made.indices) <= _MOST_INDICES
        facts["indices" if few else "indices_digest"] = made.indices if few else _digest(map(repr, made.indices))
        facts["indices_sorted"] = _digest(sorted(map(repr, made.indices)))
        facts["sampler_drew"], facts["sampler_rng"] = made.sampler_drew, dict(made.sampler_rng)
    if made.worker_seed is not None:
        facts["worker_seed"] = made.worker_seed
    return facts


def _of_dataset(loader: Any) -> dict[str, Any]:
    chain = list(datasets(loader))
    if not chain:
        return {}
    facts: dict[str, Any] = {
        "dataset": type(chain[-1]).__name__,
        "iterable": isinstance(chain[0], IterableDataset),
    }
    shard = next((dataset for dataset in chain if hasattr(dataset, "process_index")), None)  # IterableDatasetShard
    if shard is not None:
        facts["num_replicas"], facts["rank"] = shard.num_processes, shard.process_index
    listing = {name: digests for dataset in chain for name, digests in _listings(dataset)}
    return facts | ({"listing": listing} if listing else {})


def _listings(dataset: Any) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the attributes that list names (files, words), with a digest in order and one of the sorted names."""
    for attribute, value in vars_of(dataset).items():
        if isinstance(value, (list, tuple, Mapping)) and 1 < len(value) <= _MOST_NAMES:
            names = [_name(entry) for entry in value]
            if all(name is not None for name in names):
                listed = [name for name in names if name is not None]
                yield attribute, (_digest(listed), _digest(sorted(listed)))


def _name(entry: Any) -> str | None:
    if isinstance(entry, tuple) and entry:  # torchvision's (path, class)
        entry = entry[0]
    return os.fspath(entry) if isinstance(entry, (str, os.PathLike)) else None


def _of_sampling(loader: Any) -> dict[str, Any]:
    chain = list(samplers(loader))
    if not chain:
        return {}
    innermost = chain[-1]
    facts: dict[str, Any] = {"sampler": type(innermost).__name__}
    for sampler in chain:
        facts |= _share(sampler)
    for fact, names in _OF_SAMPLER.items():
        value = next((value for name in names if _plain(value := getattr(innermost, name, None))), None)
        if value is not None:
            facts[fact] = value
    generator = getattr(innermost, "generator", None)
    if isinstance(generator, torch.Generator):
        facts["generator_seed"] = generator.initial_seed()
    batch_size = getattr(loader, "batch_size", None) or getattr(chain[0], "batch_size", None)
    return facts | ({"batch_size": batch_size} if _plain(batch_size) else {})


_OF_SAMPLER = {
    "sampler_seed": ("seed", "initial_seed"),
    "epoch": ("epoch",),
    "shuffle": ("shuffle",),
}


def _share(sampler: Any) -> dict[str, Any]:
    """Return which of how many replicas this sampler deals for; nothing where it deals to one alone."""
    for count, index in (("num_replicas", "rank"), ("num_processes", "process_index")):
        replicas, rank = getattr(sampler, count, None), getattr(sampler, index, None)
        if isinstance(replicas, int) and isinstance(rank, int) and replicas > 1:
            return {"num_replicas": replicas, "rank": rank}
    return {}


def _of_workers(loader: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"num_workers": loader.num_workers}
    if isinstance(loader.generator, torch.Generator):
        facts["loader_generator_seed"] = loader.generator.initial_seed()
    if not loader.num_workers:
        return facts
    context = loader.multiprocessing_context
    facts["start_method"] = context.get_start_method() if context else torch.multiprocessing.get_start_method()
    function = getattr(loader.worker_init_fn, "__wrapped__", loader.worker_init_fn)
    return facts | ({"worker_init_fn": _spelled(function)} if function is not None else {})


def _spelled(function: Any) -> str:
    """Return a function as one would write it: `partial` with its arguments, which often hold a rank."""
    if isinstance(function, functools.partial):
        arguments = [repr(value) for value in function.args]
        arguments += [f"{name}={value!r}" for name, value in function.keywords.items()]
        return f"{_spelled(function.func)}({', '.join(arguments)})"[:200]
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", type(function).__name__)
    return f"{module}.{name}" if module else name


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, str))


def _digest(names: Any) -> str:
    digest = xxhash.xxh3_64()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
