"""What a checkpoint format implements: recognising a source, and reading its tensors one by one, each whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the user allows a reader to do.

    Attributes:
        allow_pickle: Unpickle classes that are not on torch's own list, in a subprocess.
    """

    allow_pickle: bool = False


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor's elements lie in a file: little-endian, row-major, without gaps.

    Attributes:
        path: The file.
        offset: Position of the first byte.
        nbytes: Length in bytes.
    """

    path: Path
    offset: int
    nbytes: int


class Checkpoint(Protocol):
    """The tensors of one model, each whole: shards of several ranks are put together.

    Methods are called from several threads at once, for any number of names, so nothing but the tables of contents is
    kept in memory. Each method raises `CheckpointError` where the files contradict their tables of contents.
    """

    @property
    def description(self) -> str:
        """The format in a few words: `safetensors, 3 files`."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's `config.json`, or empty."""

    @property
    def ties(self) -> tuple[frozenset[str], ...]:
        """Names that are one tensor in the model that was saved, as far as the files or the model show it."""

    @property
    def unread(self) -> Mapping[str, str]:
        """Names that the source has, or should have, and that cannot be read as a tensor, with the reason."""

    @property
    def inconsistent_replicas(self) -> Mapping[str, str]:
        """Names of which several ranks hold different full copies, with the ranks that differ: none can be read."""

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors, in the order in which reading is cheapest."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the full tensor, whatever its shards are."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the tensor is stored."""

    def read(self, name: str, rows: range) -> torch.Tensor:
        """Return consecutive indices of dim 0, on the CPU: shape (len(rows), *shape[1:]); a scalar for any rows."""

    def extent(self, name: str) -> Extent | None:
        """Return where the tensor lies in one piece, so that its bits can be read without this reader; else None."""

    def require_unchanged(self) -> None:
        """Raise `CheckpointError` if a file has changed since the checkpoint was opened."""

    def close(self) -> None:
        """Release files, memory and temporary folders. No method may be called after it."""


@runtime_checkable
class RenamedWhenSaved(Protocol):
    """A live model that its library saves under other names, or cut into other tensors."""

    def as_saved(self) -> Checkpoint | None:
        """Return the model as its library saves it, or None where that is the same."""


@runtime_checkable
class MergesAdapters(Protocol):
    """A live model that may hold adapters beside its base weights."""

    def merged(self) -> Checkpoint | None:
        """Return the base model with its active adapters merged into copies of its weights; None where it cannot be."""


Value = bool | int | float | str | None

NUMBERED = "parameter "
"""What stands before the number of a parameter that has no name."""
STEP = " step"
"""What the names of step counts, of single parameters or of groups of them, end with in `TrainingStates.values`."""


@dataclass(frozen=True, slots=True)
class TrainingStates:
    """What a run saved beside the model's weights, to go on from there.

    Attributes:
        tensors: The optimizer's tensors, named `PARAMETER KIND` (`model.norm.weight exp_avg`), each whole; generators
            and other tensors, named by where they are in the files.
        values: Numbers and texts by name: learning rates, step counts, the scheduler's fields, digests of objects.
        partial: Names of tensors of which the files hold one rank's shard alone, with the shape of the whole.
    """

    tensors: Checkpoint
    values: Mapping[str, Value]
    partial: Mapping[str, tuple[int, ...]]


@runtime_checkable
class HoldsTrainingStates(Protocol):
    """A checkpoint that may hold the states of the optimizer, the scheduler and the generators, too."""

    def training_states(self) -> TrainingStates | None:
        """Return them, or None where there are none; the tensors are closed with the checkpoint.

        Raises:
            CheckpointError: Their files are damaged, hostile or incomplete, in one sentence.
        """


class CheckpointFormat(Protocol):
    """Opens checkpoints of one format."""

    name: str
    precedence: int
    """Where several formats recognise a source, the one of the highest precedence reads it."""

    def recognises(self, source: Any) -> bool:
        """Return whether the source, a path that exists or a live object, has this format. Looks at names alone."""

    def open(self, source: Any, options: ReadOptions) -> Checkpoint:
        """Read the table of contents.

        Raises:
            CheckpointError: The files are damaged, hostile or incomplete, in one sentence.
        """
