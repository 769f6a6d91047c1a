"""Which random generators a data loader draws from while it makes each batch, and in which state they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from tpcheck.collect.listening import Listened, Log, Made
from tpcheck.collect.rng import States, moved, rng_states
from tpcheck.collect.unwrap import torch_loader
from tpcheck.collect.worker_reports import Collate, Reporter, WorkerInit, WorkerReports


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
