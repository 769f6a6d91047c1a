"""One comparison of checkpoints divided over the ranks of a launcher, in lockstep: none waits for one that failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from tpcheck.core.environment import num_cores
from tpcheck.core.errors import CheckpointError, TpcheckError

if TYPE_CHECKING:
    from tpcheck.world.rank import Rank

T = TypeVar("T")


class FailedElsewhere(CheckpointError):
    """Another rank has raised, whose message this is, or has ended."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a rank sends in place of a result when it has raised."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Division:
    """This process's share of the work.

    Attributes:
        index: The number of this process, below `count`.
        count: How many processes divide the work.
        num_threads: How many threads this process uses.
        gather: Return the value of every process, by index, on every process; collective.
    """

    index: int
    count: int
    num_threads: int
    gather: Callable[[Any], tuple[Any, ...]]

    @classmethod
    def over(cls, rank: Rank | None, num_local_ranks: int = 1) -> Division:
        """Return the share of a rank in its world, or all of the work where there is none."""
        if rank is None:
            return cls(0, 1, num_cores(), lambda value: (value,))
        return cls(rank.rank, rank.world_size, max(1, num_cores() // num_local_ranks), rank.gather)

    def share(self, values: Iterable[T]) -> Iterator[T]:
        """Yield those of the values that are this process's to work on."""
        return islice(values, self.index, None, self.count)

    def joined(self, step: str, results: Sequence[T]) -> tuple[T, ...]:
        """Return the results for all values, in their order, from those of each process for its share."""
        parts = self.exchange(step, results)
        total = sum(map(len, parts))
        return tuple(parts[number % self.count][number // self.count] for number in range(total))

    def exchange(self, step: str, value: T) -> tuple[T, ...]:
        """Return the value of every process. All take the same steps, in one order.

        Raises:
            FailedElsewhere: Another process has raised, or has ended.
            CheckpointError: Another process is at another step: it has read other files.
        """
        try:
            answers = self.gather((step, value))
        except RuntimeError as error:  # of gloo, which notices at once when a process ends
            raise FailedElsewhere(f"another rank has ended: {str(error).splitlines()[0]}") from error
        for rank, (_, answer) in enumerate(answers):
            if isinstance(answer, _Failure):
                raise FailedElsewhere(f"rank {rank}: {answer.sentence}")
        self._require_equal("what they hold", [its_step for its_step, _ in answers])
        return tuple(its_value for _, its_value in answers)

    def require_same(self, what: str, value: object) -> None:
        """Raise on every process where they do not all have one value.

        Raises:
            CheckpointError: They have read other files.
        """
        self._require_equal(what, self.exchange(what, value))

    def _require_equal(self, what: str, values: Sequence[object]) -> None:
        differing = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if differing is not None:
            raise CheckpointError(
                f"The ranks read different files: {what} differs between rank 0 and rank {differing}. "
                "A comparison that ranks divide needs the same folders on all of them, as on a shared disk."
            )

    @contextmanager
    def in_lockstep(self) -> Iterator[None]:
        """Let what one process raises end all of them.

        Raises:
            FailedElsewhere: Another process has raised.
        """
        try:
            yield
        except FailedElsewhere:
            raise
        except Exception as error:
            failure = _Failure(str(error) if isinstance(error, TpcheckError) else repr(error))
            with suppress(RuntimeError):  # a process that has ended needs no answer
                self.gather(("", failure))
            raise
        self.exchange("the end", None)
