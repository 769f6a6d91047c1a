"""How a data loader makes its batches: sampler, seeds, replicas, workers, and generators that are drawn from."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
import xxhash
from torch.utils.data import DataLoader, IterableDataset

from tpcheck.batches.generators import GeneratorStates, changed_generators, rng_states
from tpcheck.batches.records import LoaderFacts
from tpcheck.batches.sampling import (
    BatchProvenance,
    RecordingSampler,
    Reporter,
    ReportingCollate,
    ReportingWorkerInit,
    SamplerLog,
    WorkerReports,
)

_INNER_LOADER = ("base_dataloader", "dataloader", "loader", "_loader")  # accelerate; common wrappers
_INNER_SAMPLER = ("batch_sampler", "sampler")
_INNER_DATASET = ("dataset",)  # accelerate's IterableDatasetShard, torch's Subset
_MAX_DEPTH = 8  # wrappers in wrappers; a cycle ends here


def loader_chain(loader: Any) -> Iterator[Any]:
    """Yield `loader` and every loader inside it, from the outside in; the last may be a torch DataLoader."""
    for _ in range(_MAX_DEPTH):
        if loader is None:
            return
        yield loader
        if _is_torch_loader(loader):
            return
        attributes = _attributes(loader)
        loader = next((attributes[name] for name in _INNER_LOADER if name in attributes), None)


def torch_loader(loader: Any) -> DataLoader[Any] | None:
    """Return the torch DataLoader inside `loader` that reads the samples, or None where there is none."""
    return next((each for each in loader_chain(loader) if _is_torch_loader(each)), None)


def _is_torch_loader(loader: Any) -> bool:
    return issubclass(type(loader), DataLoader)  # not isinstance: accelerate's wrappers claim DataLoader's class


def _is_dispatcher(loader: Any) -> bool:
    """Return whether accelerate reads several batches on one process and sends each process a slice of them."""
    return any(type(each).__name__ == "DataLoaderDispatcher" for each in loader_chain(loader))


def _num_dropped(loader: Any) -> int:
    """Return how many batches accelerate's SkipDataLoader, or its DataLoaderShard of a stream, makes and drops."""
    number = _attributes(loader).get("skip_batches", 0)
    return number if isinstance(number, int) else 0


def _samplers(loader: Any) -> list[Any]:
    """Return the samplers of a torch DataLoader from the outside in: batch samplers, their shards, the sampler."""
    candidates = (getattr(loader, name, None) for name in _INNER_SAMPLER)
    return _chain(next((sampler for sampler in candidates if sampler is not None), None), _INNER_SAMPLER)


def _attributes(value: Any) -> dict[str, Any]:
    """Return an object's instance attributes, without calling its `__getattr__`."""
    attributes = getattr(value, "__dict__", None)
    return attributes if isinstance(attributes, dict) else {}


def _chain(value: Any, names: tuple[str, ...]) -> list[Any]:
    """Return `value`, what it wraps under the first of these names that it has, and so on."""
    chain: list[Any] = []
    while value is not None and len(chain) < _MAX_DEPTH:
        chain.append(value)
        value = next((inner for name in names if (inner := getattr(value, name, None)) is not None), None)
    return chain


class LoaderObserver:
    """Observes which samples and generators the batches of a loader are made from, in this process and in workers.

    Call `before_batch` before each batch is requested and `after_batch` when it has arrived; `remove` at the end.
    Random streams and batches stay as they are. The hooks are the torch DataLoader's own `worker_init_fn`,
    `collate_fn` and sampler; pickling or copying the loader gives one without hooks. Works with fork and spawn workers,
    persistent ones and prefetching. Without a torch DataLoader only this process's generators are seen.
    """

    def __init__(self, loader: Any) -> None:
        inner = torch_loader(loader)
        self._loader = loader
        self._torch_loader = inner
        self._number = 0
        # Code around the DataLoader may draw, too: the hooks inside do not see that.
        self._observes_outside = inner is None or not _is_library_loader(loader)
        # A stream of this process may draw its order as it begins, before anything is asked of the sampler.
        is_stream = inner is not None and isinstance(inner.dataset, IterableDataset)
        self._observes_start = is_stream and inner is not None and not inner.num_workers
        self._before = GeneratorStates()
        self._reports = WorkerReports() if inner is not None and inner.num_workers else None
        # Which batch the loop gets is unknown where several become one, or where they arrive in any order.
        in_order = self._reports is None or getattr(inner, "in_order", True)
        self._order_known = in_order and not _is_dispatcher(loader)
        self._log = SamplerLog(
            dataset=inner.dataset if inner is not None and self._reports is None else None,
            has_workers=self._reports is not None,
            persistent=self._reports if inner is not None and inner.persistent_workers else None,
        )
        self._originals = self._install(inner) if inner is not None else {}

    def before_batch(self, *, starts_epoch: bool = False) -> None:
        """Note the states of this process's generators."""
        if starts_epoch:
            self._number = 0
        # Otherwise the hooks see everything.
        is_seen_here = self._observes_outside or (self._observes_start and starts_epoch)
        self._before = rng_states() if is_seen_here else GeneratorStates()

    def after_batch(self) -> BatchProvenance:
        """Return how the batch that has just arrived was made."""
        provenance = self._next_made() if self._order_known else None
        if provenance is None:
            provenance = BatchProvenance(rng=self._before, find_drawn=self._drawn_here())
        elif self._before:
            drawn_by_loader, sampler_drew = provenance.find_drawn, provenance.sampler_drew
            drawn_here = self._drawn_here()

            def find_drawn() -> tuple[str, ...]:
                drawn = drawn_by_loader()
                return drawn + tuple(set(drawn_here()) - {*drawn, *sampler_drew})

            provenance.find_drawn = find_drawn
            provenance.rng = self._before | provenance.rng
        provenance.number = self._number
        self._number += 1
        provenance.loader_facts = partial(loader_facts, self._loader, provenance)
        return provenance

    def remove(self) -> None:
        """Give the loader its functions and sampler back."""
        if self._torch_loader is not None:
            vars(self._torch_loader).update(self._originals)
        self._originals = {}

    def _install(self, loader: DataLoader[Any]) -> dict[str, Any]:
        reporter = Reporter(self._reports.sender if self._reports else None, self._log.batch_made)
        # DataLoader.__setattr__ refuses a new sampler once the loader is initialised.
        attributes = vars(loader)
        sampler = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        originals = {name: attributes[name] for name in ("collate_fn", "worker_init_fn", sampler)}
        attributes["collate_fn"] = ReportingCollate(reporter, loader.collate_fn)
        attributes["worker_init_fn"] = ReportingWorkerInit(reporter, loader.worker_init_fn)
        attributes[sampler] = RecordingSampler(attributes[sampler], self._log)
        return originals

    def _next_made(self) -> BatchProvenance | None:
        """Return the oldest batch that the loop has not got, leaving out those that are skipped; None where unknown."""
        num_dropped = sum(map(_num_dropped, loader_chain(self._loader)))
        while self._log.pending:
            provenance = self._log.pending.popleft()
            if not provenance.is_requested:
                continue
            number, self._log.num_made = self._log.num_made, self._log.num_made + 1
            if number == 0:
                self._number = 0
            if number < num_dropped:
                continue
            if self._reports is not None and self._torch_loader is not None:
                is_stream = isinstance(self._torch_loader.dataset, IterableDataset)
                num_workers = self._torch_loader.num_workers
                _add_worker(provenance, number, num_workers, self._reports, is_stream=is_stream)
            return provenance
        return None

    def _drawn_here(self) -> Callable[[], tuple[str, ...]]:
        """Return a function that names the generators of this process that moved since `before_batch`.

        It leaves out the seeds that a starting loader draws.
        """
        before, after, starts = self._before, rng_states(), not self._number

        def find_drawn() -> tuple[str, ...]:
            drawn = changed_generators(before, after)
            if starts and "torch" in drawn and _only_seeds_drawn(before.raw("torch"), after.raw("torch")):
                return tuple(name for name in drawn if name != "torch")
            return drawn

        return find_drawn


def _add_worker(
    provenance: BatchProvenance, number: int, num_workers: int, reports: WorkerReports, *, is_stream: bool
) -> None:
    """Add which worker made the batch, and what it reports; torch deals batches to workers in turn."""
    worker = number % num_workers
    if is_stream and num_workers > 1:
        provenance.stream_worker = (worker, num_workers)
    states = reports.states_around(worker, number // num_workers)
    if states is not None:
        before, after, provenance.worker_seed = states
        provenance.rng |= {f"worker{worker}.{name}": digest for name, digest in before.items()}
        provenance.find_drawn = partial(tuple, [f"worker{worker}.{name}" for name in changed_generators(before, after)])


def _is_library_loader(loader: Any) -> bool:
    """Return whether only torch and accelerate handle the batches once they are collated."""
    module = getattr(type(loader).__iter__, "__module__", "") if hasattr(type(loader), "__iter__") else ""
    return module.partition(".")[0] in ("torch", "accelerate")


def _only_seeds_drawn(before: bytes | None, after: bytes | None) -> bool:
    """Return whether torch's generator moved by at most a RandomSampler's seed and an iterator's base seed."""
    if before is None:
        return False
    replay = torch.Generator()
    replay.set_state(torch.frombuffer(bytearray(before), dtype=torch.uint8))
    for _ in range(2):
        torch.empty((), dtype=torch.int64).random_(generator=replay)
        if replay.get_state().numpy().tobytes() == after:
            return True
    return False


_MAX_ATTRIBUTES = 32  # of one object that are looked at
_MAX_INDICES = 64  # sample indices of a batch that are sent one by one; more are sent as a digest
_MAX_NAMES = 1_000_000  # entries of a dataset's listing


def loader_facts(loader: Any, provenance: BatchProvenance) -> LoaderFacts:
    """Return what is known of any iterable of batches, and of one batch.

    Call it only when batches differ: a dataset's list of files is read from end to end.
    """
    inner = torch_loader(loader)
    source = inner if inner is not None else loader
    return LoaderFacts(
        **_dataset_facts(source) | _sampler_facts(source) | _index_facts(provenance),
        numbers=_numbers(loader, source) or None,
        dispatch_batches=_is_dispatcher(loader),
        worker_init_fn=None if inner is None or not inner.num_workers else _function_name(inner.worker_init_fn),
        PYTHONHASHSEED=os.environ.get("PYTHONHASHSEED", "unset"),
        hash=f"{hash('tpcheck') & (1 << 64) - 1:016x}",
        drew=provenance.drew,
        worker_seed=provenance.worker_seed,
    )


def _index_facts(provenance: BatchProvenance) -> dict[str, Any]:
    indices = provenance.indices
    if indices is None:
        return {}
    return {
        "indices": indices if len(indices) <= _MAX_INDICES else None,
        "indices_digest": _digest(map(repr, indices)),
        "indices_sorted": _digest(sorted(map(repr, indices))),
        "sampler_drew": provenance.sampler_drew,
        "sampler_rng": dict(provenance.sampler_rng),
    }


def _dataset_facts(loader: Any) -> dict[str, Any]:
    chain = _chain(getattr(loader, "dataset", None), _INNER_DATASET)
    if not chain:
        return {}
    facts: dict[str, Any] = {
        "dataset": type(chain[-1]).__name__,
        "iterable": isinstance(chain[0], IterableDataset),
        "reads_rank": any(_reads_rank(dataset) for dataset in chain),
    }
    shard = next((dataset for dataset in chain if hasattr(dataset, "process_index")), None)  # IterableDatasetShard
    if shard is not None:
        facts["num_replicas"], facts["rank"] = shard.num_processes, shard.process_index
    listing = {name: digests for dataset in chain for name, digests in _listings(dataset)}
    return facts | ({"listing": listing} if listing else {})


def _listings(dataset: Any) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the attributes that list names (files, words), with digests of the names in order and sorted."""
    for attribute, value in _attributes(dataset).items():
        if isinstance(value, (list, tuple, Mapping)) and 1 < len(value) <= _MAX_NAMES:
            names = [_name(entry) for entry in value]
            if all(name is not None for name in names):
                known = [name for name in names if name is not None]
                yield attribute, (_digest(known), _digest(sorted(known)))


def _name(entry: Any) -> str | None:
    if isinstance(entry, tuple) and entry:  # torchvision's (path, class)
        entry = entry[0]
    return os.fspath(entry) if isinstance(entry, (str, os.PathLike)) else None


_SAMPLER_FACTS = {"sampler_seed": ("seed", "initial_seed"), "epoch": ("epoch",), "shuffle": ("shuffle",)}


def _sampler_facts(loader: Any) -> dict[str, Any]:
    chain = _samplers(loader)
    if not chain:
        return {}
    innermost = chain[-1]
    facts: dict[str, Any] = {"sampler": type(innermost).__name__}
    for sampler in chain:
        facts |= _replica_of(sampler)
        if getattr(sampler, "replacement", None) is True:
            facts["replacement"] = True
    for fact, names in _SAMPLER_FACTS.items():
        value = next((value for name in names if _is_plain(value := getattr(innermost, name, None))), None)
        if value is not None:
            facts[fact] = value
    generator = getattr(innermost, "generator", None)
    if isinstance(generator, torch.Generator):
        facts["generator_seed"] = generator.initial_seed()
    return facts


def _replica_of(sampler: Any) -> dict[str, Any]:
    """Return for which of how many replicas this sampler gives samples; nothing where there is only one."""
    for count, index in (("num_replicas", "rank"), ("num_processes", "process_index")):
        replicas, rank = getattr(sampler, count, None), getattr(sampler, index, None)
        if isinstance(replicas, int) and isinstance(rank, int) and replicas > 1:
            return {"num_replicas": replicas, "rank": rank}
    return {}


_RANK_NAMES = {"get_rank", "RANK", "LOCAL_RANK", "get_local_rank"}
_WORLD_SIZE_NAMES = {"get_world_size", "WORLD_SIZE"}


def _reads_rank(dataset: Any) -> bool:
    """Return whether the method that gives samples names the world rank and size, as `dist.get_rank()` does."""
    codes = [method.__code__ for method in _sampling_methods(dataset)]
    names = {name for code in codes for name in (*code.co_names, *map(str, code.co_consts))}
    return bool(names & _RANK_NAMES and names & _WORLD_SIZE_NAMES)


def _sampling_methods(dataset: Any) -> list[Any]:
    methods = (getattr(type(dataset), name, None) for name in ("__iter__", "__getitem__", "__len__"))
    return [method for method in methods if hasattr(method, "__code__")]


def _variables_outside(dataset: Any) -> dict[str, Any]:
    """Return the variables around the methods that give samples, such as a `rank` of the script, which they read."""
    found: dict[str, Any] = {}
    for method in _sampling_methods(dataset):
        variables = getattr(method, "__globals__", {})
        found |= {name: variables[name] for name in method.__code__.co_names if name in variables}
        for name, cell in zip(method.__code__.co_freevars, getattr(method, "__closure__", None) or (), strict=False):
            with suppress(ValueError):  # not assigned yet
                found[name] = cell.cell_contents
    return {name: value for name, value in found.items() if not isinstance(value, (ModuleType, FunctionType, type))}


def _numbers(loader: Any, source: Any) -> dict[str, int]:
    """Return the integers in attributes of the dataset, the samplers and the loader, and of objects in them.

    Of the dataset also those in variables that its methods read.
    """
    objects = {"loader": [loader], "dataset": _chain(getattr(source, "dataset", None), _INNER_DATASET)}
    objects["sampler"] = _samplers(source)
    numbers: dict[str, int] = {}
    for kind, chain in objects.items():
        for value in chain:
            if type(value).__module__.startswith("torch.utils.data.dataloader"):
                continue
            outside = _variables_outside(value) if kind == "dataset" else {}
            for name, attribute in [*_attributes(value).items(), *outside.items()][:_MAX_ATTRIBUTES]:
                if type(attribute) is int:
                    numbers[f"{kind}.{name}"] = attribute
                # An iterator is under way, and no setting: those of torch and torchdata note the world rank.
                is_setting = not isinstance(attribute, (torch.nn.Module, Iterator))
                inner = _attributes(attribute) if is_setting else {}
                for inner_name, each in [*inner.items()][:_MAX_ATTRIBUTES]:
                    if type(each) is int:
                        numbers[f"{kind}.{name}.{inner_name}"] = each
    return numbers


def _function_name(function: Any) -> str | None:
    """Return a function as one would write it: `partial` with its arguments, which often include a rank."""
    function = getattr(function, "__wrapped__", function) if isinstance(function, ReportingWorkerInit) else function
    if function is None:
        return None
    if isinstance(function, functools.partial):
        arguments = [repr(value) for value in function.args]
        arguments += [f"{name}={value!r}" for name, value in function.keywords.items()]
        return f"{_function_name(function.func)}({', '.join(arguments)})"[:200]
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", type(function).__name__)
    return f"{module}.{name}" if module else name


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, str))


def _digest(names: Any) -> str:
    digest = xxhash.xxh3_64()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
