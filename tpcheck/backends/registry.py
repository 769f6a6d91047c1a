"""Finds backends and checkpoint formats by entry point, so that other packages can add theirs."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from tpcheck.core.errors import TpcheckError, UsageError
from tpcheck.core.extras import install_command, is_missing, missing_package

if TYPE_CHECKING:
    from torch import nn

    from tpcheck.backends.checkpoint_format import CheckpointFormat
    from tpcheck.backends.interface import Backend, ReadsLayouts
    from tpcheck.backends.layout import Layout

BACKENDS = "tpcheck.backends"
CHECKPOINTS = "tpcheck.checkpoints"


def backend_names() -> tuple[str, ...]:
    """Return the names of all installed backends."""
    return tuple(sorted(_entries(BACKENDS)))


def load_backend(backend: str | Backend) -> Backend:
    """Return the installed backend of that name; an object is returned as it is.

    Raises:
        UsageError: No backend of that name is installed.
        TpcheckError: The backend needs a package that is not installed.
    """
    if not isinstance(backend, str):
        return backend
    entries = _entries(BACKENDS)
    if backend not in entries:
        raise UsageError("backend", backend, sorted(entries))
    loaded: Backend = _instance("backend", entries[backend])
    return loaded


def modules_of(backend: str) -> tuple[str, ...]:
    """Return the modules that ranks import to load a backend, if it is one of this package.

    Those of others may run tensor operations when they are imported, which must not happen before ranks are forked.
    """
    entry = _entries(BACKENDS).get(backend)
    own = __name__.partition(".")[0]
    return (entry.module,) if entry is not None and entry.module.partition(".")[0] == own else ()


def require_library(backend: str) -> None:
    """Raise UsageError if the library that a backend of this package shards with is not installed. Imports nothing."""
    for module in modules_of(backend):
        library = module.rpartition(".")[2]  # tpcheck.backends.deepspeed
        if is_missing(library):
            raise UsageError("backend", backend, f"a library that is installed: {install_command(library)}")


def checkpoint_formats() -> tuple[CheckpointFormat, ...]:
    """Return all installed checkpoint formats, those of the highest precedence first.

    Raises:
        TpcheckError: A format needs a package that is not installed.
    """
    formats: list[CheckpointFormat] = [
        _instance("checkpoint format", entry) for _, entry in sorted(_entries(CHECKPOINTS).items())
    ]
    return tuple(sorted(formats, key=lambda checkpoint_format: -checkpoint_format.precedence))


def layouts_of(model: nn.Module) -> dict[str, Layout]:
    """Return the layouts of a live model's parameters, as far as an installed backend can read them.

    Asks only the backends that bear the name of a package (`deepspeed`) that one of the model's modules comes from.
    Collective over the TP group.
    """
    layouts: dict[str, Layout] = {}
    for reader in layout_readers(model).values():
        layouts |= reader.layouts_of(model)
    return layouts


def layout_readers(model: nn.Module) -> dict[str, ReadsLayouts]:
    """Return the backends that can read layouts, by the name of the package that the model has modules from."""
    from tpcheck.backends.interface import ReadsLayouts

    packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
    named = {
        name: _instance("backend", entry) for name, entry in sorted(_entries(BACKENDS).items()) if name in packages
    }
    return {name: backend for name, backend in named.items() if isinstance(backend, ReadsLayouts)}


def _instance(kind: str, entry: EntryPoint) -> Any:
    try:
        return entry.load()()
    except ImportError as error:
        raise TpcheckError(f"{kind} {entry.name!r} cannot be loaded: {missing_package(error) or error}") from error


@cache  # reads a file of every installed package: 7 ms of 100
def _entries(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}
