"""What is known of a data loader: who samples, with which seed, for which of how many replicas, in which workers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import xxhash
from torch.utils.data import DataLoader, IterableDataset

from tpcheck.batches.generators import States, moved, rng_states
from tpcheck.batches.sampling import Collate, Listened, Log, Made, Reporter, WorkerInit, WorkerReports

_INNER_LOADER = ("base_dataloader", "dataloader", "loader", "_loader")  # accelerate; common wrappers
_INNER_SAMPLER = ("batch_sampler", "sampler")
_INNER_DATASET = ("dataset",)  # accelerate's IterableDatasetShard, torch's Subset
_DEEPEST = 8  # wrappers in wrappers; a cycle ends here


def torch_loader(loader: Any) -> DataLoader[Any] | None:
    """Return the torch DataLoader that does the work inside `loader`, or None where there is none to be seen."""
    for _ in range(_DEEPEST):
        if issubclass(type(loader), DataLoader):  # type(): accelerate's wrappers say that they are DataLoaders
            return loader  # type: ignore[no-any-return]
        loader = next((vars_of(loader)[name] for name in _INNER_LOADER if name in vars_of(loader)), None)
    return None


def loaders(loader: Any) -> Iterator[Any]:
    """Yield `loader` and every loader inside it, from the outside in."""
    for _ in range(_DEEPEST):
        if loader is None:
            return
        yield loader
        if issubclass(type(loader), DataLoader):
            return
        loader = next((vars_of(loader)[name] for name in _INNER_LOADER if name in vars_of(loader)), None)


def samplers(loader: Any) -> Iterator[Any]:
    """Yield the samplers of a torch DataLoader from the outside in: batch samplers, their shards, the sampler."""
    both = (getattr(loader, name, None) for name in _INNER_SAMPLER)
    yield from _chain(next((sampler for sampler in both if sampler is not None), None), _INNER_SAMPLER)


def datasets(loader: Any) -> Iterator[Any]:
    """Yield the datasets of a loader from the outside in."""
    yield from _chain(getattr(loader, "dataset", None), _INNER_DATASET)


def vars_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object's own, without asking its `__getattr__`."""
    attributes = getattr(value, "__dict__", None)
    return attributes if isinstance(attributes, dict) else {}


def _chain(value: Any, inner: tuple[str, ...]) -> Iterator[Any]:
    for _ in range(_DEEPEST):
        if value is None:
            return
        yield value
        value = next((held for name in inner if (held := getattr(value, name, None)) is not None), None)


class Observation:
    """Made by `observe_workers`. Call `asked` before and `made` after each batch; `remove` at the end.

    Streams and batches stay as they are. The hooks are the loader's own: `worker_init_fn`, `collate_fn`, and the
    sampler, which is only listened to; pickling or copying the loader gives a loader without them.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = torch_loader(loader)
        self._number = 0
        self._beyond = self._loader is None or not _is_of_libraries(loader)
        self._before = States()
        self._reports = WorkerReports() if self._loader is not None and self._loader.num_workers else None
        self._log = Log(self._reports if self._loader is not None and self._loader.persistent_workers else None)
        self._originals = self._install(self._loader) if self._loader is not None else {}

    def asked(self) -> None:
        """Note the states of this process's generators; call it before a batch is asked for."""
        if not self._beyond:
            return  # the loader's own hooks see all of it
        self._before = rng_states()

    def made(self) -> Made:
        """Return how the batch that has just arrived was made."""
        while self._log.pending:
            made = self._log.pending.popleft()
            if self._reports is None and not made.whole:
                continue  # given out and then skipped
            if self._reports is not None:
                self._add_worker(made, self._reports)
            if self._beyond:
                made.drawn = partial(_together, made.drawn, self._drawn_here(), frozenset(made.sampler_drew))
                made.rng = self._before | made.rng
            self._number = made.number + 1
            return made
        made = Made(self._number, rng=self._before, drawn=self._drawn_here(), exact=False)
        self._number += 1
        return made

    def _drawn_here(self) -> Callable[[], tuple[str, ...]]:
        """Return what tells what this process has drawn from since the batch was asked for."""
        return partial(_drawn_between, self._before, rng_states(), starts=not self._number)

    def remove(self) -> None:
        """Give the loader its own functions and sampler back."""
        if self._loader is not None:
            vars(self._loader).update(self._originals)
        self._originals = {}

    def __enter__(self) -> Observation:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _install(self, loader: DataLoader[Any]) -> dict[str, Any]:
        reporter = Reporter(self._reports.sender if self._reports else None, self._log.finish)
        # Past DataLoader.__setattr__, which refuses a new sampler once the loader is made.
        own = vars(loader)
        sampler = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        originals = {name: own[name] for name in ("collate_fn", "worker_init_fn", sampler)}
        self._log.dataset = None if loader.num_workers else loader.dataset  # workers have copies of their own
        own["collate_fn"] = Collate(reporter, loader.collate_fn)
        own["worker_init_fn"] = WorkerInit(reporter, loader.worker_init_fn)
        own[sampler] = Listened(own[sampler], self._log)
        return originals

    def _add_worker(self, made: Made, reports: WorkerReports) -> None:
        assert self._loader is not None
        if not getattr(self._loader, "in_order", True):
            return
        worker = made.number % self._loader.num_workers
        bracket = reports.around(worker, made.number // self._loader.num_workers)
        if bracket is not None:
            before, after, made.worker_seed = bracket
            made.rng |= {f"worker{worker}.{name}": digest for name, digest in before.items()}
            made.drawn = partial(tuple, [f"worker{worker}.{name}" for name in moved(before, after)])


def observe_workers(loader: Any) -> Observation:
    """Watch which generators the batches of `loader` are drawn from, in this process and in its workers.

    Works with fork and spawn workers, persistent ones and prefetching. Around anything but a torch DataLoader (or a
    wrapper of one) only this process's generators are seen, between `asked` and `made`.
    """
    return Observation(loader)


def _is_of_libraries(loader: Any) -> bool:
    """Tell whether nobody else's code makes anything of the batches once they are collated."""
    module = getattr(type(loader).__iter__, "__module__", "") if hasattr(type(loader), "__iter__") else ""
    return module.partition(".")[0] in ("torch", "accelerate")


def _together(
    first: Callable[[], tuple[str, ...]], second: Callable[[], tuple[str, ...]], sampler_drew: frozenset[str]
) -> tuple[str, ...]:
    drew = first()
    return drew + tuple(set(second()) - {*drew, *sampler_drew})


def _drawn_between(before: States, after: States, *, starts: bool) -> tuple[str, ...]:
    """Return what was drawn from, the seeds of a starting loader aside."""
    drew = moved(before, after)
    if starts and "torch" in drew and _only_seeds_drawn(before.bits("torch"), after.bits("torch")):
        return tuple(name for name in drew if name != "torch")
    return drew


def _only_seeds_drawn(before: bytes | None, after: bytes | None) -> bool:
    """Tell whether torch's generator moved by no more than a RandomSampler's seed and an iterator's base seed."""
    if before is None:
        return False
    replay = torch.Generator()
    replay.set_state(torch.frombuffer(bytearray(before), dtype=torch.uint8))
    for _ in range(2):
        torch.empty((), dtype=torch.int64).random_(generator=replay)
        if replay.get_state().numpy().tobytes() == after:
            return True
    return False


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
