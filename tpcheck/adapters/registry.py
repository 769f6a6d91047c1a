"""Finds backends and checkpoint formats by entry point, so that a third party's stands beside ours."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from tpcheck.adapters.checkpoints import CheckpointFormat
from tpcheck.adapters.layout import Layout
from tpcheck.adapters.protocols import Backend, TellsLayouts
from tpcheck.errors import TpcheckError, UsageError

if TYPE_CHECKING:
    from torch import nn

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
