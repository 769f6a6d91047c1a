"""`tpcheck.watch` and `tpcheck.check_batch`: a data loader, or one batch, compared between ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from tpcheck.batches.options import WatchArguments, WatchOptions, takes_watch_options
from tpcheck.batches.provenance import LoaderObserver
from tpcheck.batches.rounds import AXES, EqualSamples, RankBatch, Status, compare, find_peers
from tpcheck.batches.watcher import Watcher
from tpcheck.core.errors import UsageError
from tpcheck.core.findings import Finding, with_nodes
from tpcheck.core.topology import Topology

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing since Python 3.11


def check_batch(
    batch: Any, *, group: Any = None, topology: Topology | None = None, timeout: float | None = None
) -> tuple[Finding, ...]:
    """Compare this rank's batch with those of its TP group and of the other replicas. Collective over both.

    Args:
        batch: Tensors and plain values in dicts, lists, tuples, dataclasses and objects.
        group, topology, timeout: As in `tpcheck.batches.options.WatchOptions`.

    Returns:
        The findings, the same on every rank; a mismatch raises nothing. Nothing where `TPCHECK=0`: the batch is not
        compared. Samples that replicas have in common are left out where `[tool.tpcheck]` has `across_dp = "ignore"`.

    Raises:
        UsageError: A launcher has started several ranks, and torch.distributed is not initialised.
        RankFailure: A rank has gone.

    Example:
        >>> findings = tpcheck.check_batch(batch)  # doctest: +SKIP
    """
    options = WatchOptions.resolve(group=group, topology=topology, timeout=timeout)
    if options is None:
        return ()
    peers = find_peers(group=group, topology=topology, timeout=options.timeout)
    equal_samples = None if options.across_dp == "ignore" else EqualSamples()
    with_rows = len(peers.dp.ranks) > 1 and equal_samples is not None
    rank_batch = RankBatch(Status.BATCH, step=0, count=0, batch=batch, with_rows=with_rows)
    findings = compare(peers, rank_batch, axes=AXES, equal_samples=equal_samples).findings
    return tuple(with_nodes(finding, peers.node_of) for finding in findings)


@takes_watch_options
def watch(loader: Iterable[Any], **options: Unpack[WatchArguments]) -> WatchedLoader:
    """Return a loader that gives the same batches, and compares each between ranks.

    Every rank of the world wraps its own loader. Wrap after `accelerate.prepare`, which makes a new one.

    Args:
        loader: Any iterable of batches.
        options: `group`, `topology`, `every`, `on_mismatch`, `across_dp`, `over_steps`, `overlap`, `timeout`: those
            of
            `tpcheck.batches.options.WatchOptions`, which documents them and where their defaults come from.

    Raises:
        UsageError: An argument or a setting is wrong.

    Iterating raises:
        BatchMismatch: Batches differ inside a TP group; `.report` says where and why.
        UnevenBatches: Some ranks have more batches than others.
        RankFailure: The loader of another rank raised, or a rank has gone.
        UsageError: A launcher has started several ranks, and torch.distributed is not initialised.

    Example:
        >>> loader = tpcheck.watch(loader)  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     engine(batch)
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise UsageError("loader", type(loader).__name__, "an iterable of batches")
    resolved = WatchOptions.resolve(**options)
    name = f"batches of {type(loader).__name__}"
    return WatchedLoader(loader, None if resolved is None else Watcher(resolved, name=name))


class WatchedLoader:
    """Has the length, attributes (`sampler`, `set_epoch`, `state_dict`) and batches of the loader inside.

    Attributes:
        watcher: Compares the batches; `watcher.source` says between which ranks. None where TPCHECK turns hooks off.
    """

    _wrapper_attributes = ("_loader", "_observer", "watcher")

    def __init__(self, loader: Any, watcher: Watcher | None) -> None:
        self._loader = loader
        self.watcher = watcher
        self._observer = None if watcher is None else LoaderObserver(loader)

    def __iter__(self) -> Iterator[Any]:
        if self.watcher is None or self._observer is None:
            return iter(self._loader)
        return self._compared(self.watcher, self._observer)

    def _compared(self, watcher: Watcher, observer: LoaderObserver) -> Iterator[Any]:
        watcher.start()
        try:
            observer.before_batch(starts_epoch=True)
            iterator = iter(self._loader)
            while True:
                try:
                    batch = next(iterator)
                except StopIteration:
                    watcher.end()
                    return
                watcher.check(batch, observer.after_batch())
                yield batch
                observer.before_batch()
        except GeneratorExit:
            watcher.abandon()
            raise
        except Exception as error:
            watcher.fail(error)
            raise
        finally:
            watcher.leave()

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name in WatchedLoader._wrapper_attributes:  # while it is being copied
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in WatchedLoader._wrapper_attributes:
            object.__setattr__(self, name, value)
        else:
            setattr(self._loader, name, value)

    def __repr__(self) -> str:
        return f"tpcheck.watch({self._loader!r})"
