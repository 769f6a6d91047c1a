"""`tpcheck.watch` and `tpcheck.check_batch`: a data loader, or one batch, compared between ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from tpcheck.batches.provenance import Observation, all_facts, observe_workers
from tpcheck.batches.rounds import Coincidence, Origin, Part, Status, compare, find_peers
from tpcheck.batches.settings import OnMismatch, chosen_settings
from tpcheck.batches.watcher import Watcher
from tpcheck.core.errors import UsageError
from tpcheck.core.findings import Finding
from tpcheck.core.topology import Topology


def check_batch(
    batch: Any, *, group: Any = None, topology: Topology | None = None, timeout: float | None = None
) -> tuple[Finding, ...]:
    """Compare this rank's batch with those of its TP group and of the other replicas. Collective over both.

    Args:
        batch: Tensors and plain values in dicts, lists, tuples, dataclasses and objects.
        group: A TP group: a torch ProcessGroup, or a DeviceMesh of one dim.
        topology: Sizes of the axes. Where neither is given, the groups of transformers, DeepSpeed, accelerate or
            Megatron are used.
        timeout: Seconds that ranks wait for each other; where it is not given, as for `tpcheck.watch`.

    Returns:
        What is wrong, the same on every rank; nothing is raised for it. Nothing where `TPCHECK=0`: no batch is looked
        at. What replicas have in common is left out where `[tool.tpcheck]` has `across_dp = "ignore"`.

    Raises:
        UsageError: torch.distributed is not initialised, or there is no TP group to be found.
        RankFailure: A rank has gone.

    Example:
        >>> findings = tpcheck.check_batch(batch)  # doctest: +SKIP
    """
    chosen = chosen_settings(group=group, topology=topology, timeout=timeout)
    if chosen is None:
        return ()
    peers = find_peers(group=group, topology=topology, timeout=chosen.timeout)
    coincidence = None if chosen.across_dp == "ignore" else Coincidence()
    with_rows = len(peers.dp.ranks) > 1 and coincidence is not None
    part = Part(Status.BATCH, step=0, count=0, batch=batch, with_rows=with_rows)
    return compare(peers, part, axes=frozenset({"tp", "dp"}), coincidence=coincidence).findings


def watch(
    loader: Iterable[Any],
    *,
    group: Any = None,
    topology: Topology | None = None,
    every: int | None = None,
    on_mismatch: OnMismatch | None = None,
    across_dp: str | None = None,
    overlap: bool | None = None,
    timeout: float | None = None,
) -> WatchedLoader:
    """Return a loader that gives the same batches, and tells as soon as ranks do not get those that they should.

    Every rank of the world wraps its own. Wrap after `accelerate.prepare`, which makes a new loader. What is not given
    comes from the environment variable TPCHECK (`0` turns the comparing off; `warn` and `raise` are for `on_mismatch`),
    then from `[tool.tpcheck]` of the nearest pyproject.toml, then from the defaults below.

    Args:
        loader: Any iterable of batches.
        group: A TP group: a torch ProcessGroup, or a DeviceMesh of one dim.
        topology: Sizes of the axes. Where neither is given, the groups of transformers, DeepSpeed, accelerate or
            Megatron are looked for when the first batch is asked for.
        every: Compare every so many batches; 1.
        on_mismatch: What to do when a TP group's batches differ, or end at different times: `raise` on every rank
            (the default), `warn` once for each field, or a callable that takes the report.
        across_dp: What to do when replicas train on the same samples: `raise`, `warn` (the default) or
            `ignore`.
        overlap: Compare while the step runs, and tell one step later; False.
        timeout: Seconds that ranks wait for each other at a batch; 300. A rank that dies or raises is heard of at once.

    Raises:
        UsageError: An argument or a setting is wrong.

    Iterating raises:
        BatchMismatch: Batches differ inside a TP group; `.report` says where and why.
        UnevenBatches: Some ranks have more batches than others.
        RankFailure: The loader of another rank raised, or a rank has gone.
        UsageError: torch.distributed is not initialised, or there is no TP group to be found.

    Example:
        >>> loader = tpcheck.watch(loader)  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     engine(batch)
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise UsageError("loader", type(loader).__name__, "an iterable of batches")
    settings = chosen_settings(
        group=group,
        topology=topology,
        every=every,
        on_mismatch=on_mismatch,
        across_dp=across_dp,
        overlap=overlap,
        timeout=timeout,
    )
    name = f"batches of {type(loader).__name__}"
    return WatchedLoader(loader, None if settings is None else Watcher(settings, name=name))


class WatchedLoader:
    """Passes for the loader inside: its length, its attributes (`sampler`, `set_epoch`, `state_dict`) and its batches.

    Attributes:
        watcher: Compares the batches; `watcher.source` says with whom. None where TPCHECK turns the comparing off.
    """

    _own = ("_loader", "_observation", "watcher")

    def __init__(self, loader: Any, watcher: Watcher | None) -> None:
        self._loader = loader
        self.watcher = watcher
        self._observation = None if watcher is None else observe_workers(loader)

    def __iter__(self) -> Iterator[Any]:
        if self.watcher is None or self._observation is None:
            return iter(self._loader)
        return self._compared(self.watcher, self._observation)

    def _compared(self, watcher: Watcher, observation: Observation) -> Iterator[Any]:
        watcher.start()
        try:
            observation.asked()
            source = iter(self._loader)
            while True:
                try:
                    batch = next(source)
                except StopIteration:
                    watcher.end()
                    return
                made = observation.made()
                watcher.check(batch, Origin(made.rng, partial(all_facts, self._loader, made)))
                yield batch
                observation.asked()
        except GeneratorExit:
            watcher.abandon()
            raise
        except Exception as error:
            watcher.failed(error)
            raise
        finally:
            watcher.leave()

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name in WatchedLoader._own:  # while it is being copied
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in WatchedLoader._own:
            object.__setattr__(self, name, value)
        else:
            setattr(self._loader, name, value)

    def __repr__(self) -> str:
        return f"tpcheck.watch({self._loader!r})"
