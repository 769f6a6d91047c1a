"""What a checkpoint format must offer; backends and formats, found by entry point, so that anyone can add theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from tpcheck.backends.layout import Layout
from tpcheck.backends.protocols import Backend, TellsLayouts
from tpcheck.core.errors import TpcheckError, UsageError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the user allows a reader.

    Attributes:
        allow_pickle: Unpickle classes that are not on torch's own list, in a subprocess.
    """

    allow_pickle: bool = False


@dataclass(frozen=True, slots=True)
class Extent:
    """A tensor's elements as they lie in a file: little-endian, row-major, without gaps.

    Attributes:
        path: The file.
        offset: Position of the first byte.
        nbytes: Length in bytes.
    """

    path: Path
    offset: int
    nbytes: int


class Checkpoint(Protocol):
    """The tensors of one model, each whole: what several ranks hold is put together.

    Methods are called from several threads at once, for any number of names, so nothing but the tables of contents is
    kept in memory. Each raises `CheckpointError` where the files do not hold what they say.
    """

    @property
    def description(self) -> str:
        """What this is, in a few words: `safetensors, 3 files`."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's `config.json`, or empty."""

    @property
    def ties(self) -> tuple[frozenset[str], ...]:
        """Names that are one tensor in the model that was saved; only what the files or the model show."""

    @property
    def unread(self) -> Mapping[str, str]:
        """What the source holds, or should, and cannot be read as a tensor, by name, with the reason."""

    @property
    def inconsistent_replicas(self) -> Mapping[str, str]:
        """Names of tensors that should be equal on several ranks and are not, with a sentence that names the ranks."""

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors, in the order in which they are best read."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, rows: range) -> torch.Tensor:
        """Return consecutive indices of dim 0, on the CPU: shape (len(rows), *shape[1:]); a scalar for any rows."""

    def extent(self, name: str) -> Extent | None:
        """Return where the tensor lies in one piece, so that its bits can be read without this reader; else None."""

    def require_unchanged(self) -> None:
        """Raise `CheckpointError` if a file has changed since the checkpoint was opened."""

    def close(self) -> None:
        """Give back files, memory and temporary folders. Nothing may be called after it."""


@runtime_checkable
class NamedOtherwiseWhenSaved(Protocol):
    """A live model whose tensors are named, and cut into tensors, otherwise where its own library saves it."""

    def as_saved(self) -> Checkpoint | None:
        """Return the model as its library saves it, or None where that is the same."""


class CheckpointFormat(Protocol):
    """Opens checkpoints of one format."""

    name: str
    precedence: int
    """Where several formats recognise a source, that of the highest precedence reads it."""

    def recognises(self, source: Any) -> bool:
        """Return whether this is one of this format: a `Path` that exists, or a live object. Looks at names alone."""

    def open(self, source: Any, options: ReadOptions) -> Checkpoint:
        """Read the table of contents.

        Raises:
            CheckpointError: The files are damaged, hostile or incomplete, in one sentence.
        """


BACKENDS = "tpcheck.backends"
CHECKPOINTS = "tpcheck.checkpoints"


def backend_names() -> tuple[str, ...]:
    """Return the names of all installed backends."""
    return tuple(sorted(_entries(BACKENDS)))


def load_backend(name: str | Backend) -> Backend:
    """Return the backend of that name; one that is given as an object already is returned as it is.

    Raises:
        UsageError: No backend of that name is installed.
        TpcheckError: The backend needs a package that is not installed.
    """
    if not isinstance(name, str):
        return name
    entries = _entries(BACKENDS)
    if name not in entries:
        raise UsageError("backend", name, sorted(entries))
    backend: Backend = _made("backend", entries[name])
    return backend


def checkpoint_formats() -> tuple[CheckpointFormat, ...]:
    """Return all installed checkpoint formats, those of the highest precedence first.

    Raises:
        TpcheckError: A format needs a package that is not installed.
    """
    formats: list[CheckpointFormat] = [
        _made("checkpoint format", entry) for _, entry in sorted(_entries(CHECKPOINTS).items())
    ]
    return tuple(sorted(formats, key=lambda one: -one.precedence))


def layouts_of(model: nn.Module) -> dict[str, Layout]:
    """Return how the parameters of a live model lie over its TP group, as far as an installed backend tells.

    Only the backends are asked whose package (`deepspeed`) the model's layers come from. Collective over the TP group.
    """
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
    found: dict[str, Layout] = {}
    for name, entry in sorted(_entries(BACKENDS).items()):
        if name in packages:
            backend = _made("backend", entry)
            found |= backend.layouts_of(model) if isinstance(backend, TellsLayouts) else {}
    return found


def _made(what: str, entry: EntryPoint) -> Any:
    try:
        return entry.load()()
    except ImportError as error:
        raise TpcheckError(f"{what} {entry.name!r} cannot be loaded: {error}") from error


def _entries(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}
