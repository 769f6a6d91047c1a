"""What one rank brings to one round of comparing: a batch, or why there is none."""

from __future__ import annotations

import struct
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch

from tpcheck.collect.batch import Entry, as_tensor
from tpcheck.collect.digested import Digested, Remembered
from tpcheck.collect.rows import sampled_rows
from tpcheck.records.batch import BatchFacts

_TOKEN = struct.Struct("<16s16sqB?6x")  # 48 bytes: all that is sent while nothing is wrong


class Status(IntEnum):
    """What a rank has to say in a round."""

    BATCH = 0
    ENDED = 1  # its loader has no more batches
    LEFT = 2  # its loop takes no more batches; it has not waited for this round
    FAILED = 3  # its loader has raised, or that of a rank in its TP group
    WRONG = 4  # its TP group has found something


@dataclass(frozen=True, slots=True)
class Said:
    """What one rank said.

    Attributes:
        digest: Of all leaves.
        rows: Of sampled rows, None where the batch has no rows.
        count: Batches that it has got before this round.
        status: What it has.
    """

    digest: bytes
    rows: bytes | None
    count: int
    status: Status

    @classmethod
    def read(cls, message: bytes) -> Said:
        digest, rows, count, status, has_rows = _TOKEN.unpack(message)
        return cls(digest, rows if has_rows else None, count, Status(status))


@dataclass(frozen=True, slots=True)
class Origin:
    """How a batch was made, as far as it was seen.

    Attributes:
        rng: Digests of random generators when it was asked for.
        loader: Returns what is known of the loader; asked when something is wrong.
    """

    rng: Mapping[str, str] = field(default_factory=dict)
    loader: Callable[[], Mapping[str, Any]] = dict


class Part:
    """One rank's batch at one step, its digests under way from the moment this is made."""

    def __init__(
        self,
        status: Status,
        *,
        step: int,
        count: int,
        batch: Any = None,
        origin: Origin | None = None,
        with_rows: bool = False,
        error: BaseException | None = None,
        remembered: Remembered | None = None,
    ) -> None:
        self.status, self.step, self.count = status, step, count
        self.error = None if error is None else Raised.of(error)
        self._origin = origin
        self._batch = Digested(batch, remembered) if status is Status.BATCH else None
        self._rows = sampled_rows(self.entries) if with_rows else None

    @property
    def entries(self) -> list[Entry]:
        return [] if self._batch is None else self._batch.entries

    def message(self, status: Status | None = None) -> bytes:
        """Return the constant number of bytes that travels at every step."""
        digest = b"" if self._batch is None else self._batch.token
        rows = b"" if self._rows is None else self._rows()
        status = self.status if status is None else status
        return _TOKEN.pack(digest, rows, self.count, status, rows != b"")

    def facts(self) -> BatchFacts:
        """Return what travels when something is wrong."""
        return BatchFacts(
            self.step,
            ended=self.status in (Status.ENDED, Status.LEFT),
            leaves=() if self._batch is None else self._batch.leaves,
            rng={} if self._origin is None else dict(self._origin.rng),
            loader={} if self._origin is None else self._origin.loader(),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by path, and the arrays whose dtype torch has."""
        found = {entry.path: as_tensor(entry) for entry in self.entries}
        return {path: tensor for path, tensor in found.items() if tensor is not None}


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception as text: its class may exist on one rank alone."""

    type: str
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Raised:
        return cls(type(error).__qualname__, str(error), "".join(traceback.format_exception(error)))
