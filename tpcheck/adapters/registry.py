"""Finds backends by entry point, so that a third party's stands beside ours."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from tpcheck.adapters.protocols import Backend
from tpcheck.errors import TpcheckError, UsageError

GROUP = "tpcheck.backends"


def backend_names() -> tuple[str, ...]:
    """Return the names of all installed backends."""
    return tuple(sorted(_entries()))


def load_backend(name: str | Backend) -> Backend:
    """Return the backend of that name; one that is given as an object already is returned as it is.

    Raises:
        UsageError: No backend of that name is installed.
        TpcheckError: The backend needs a package that is not installed.
    """
    if not isinstance(name, str):
        return name
    entries = _entries()
    if name not in entries:
        raise UsageError("backend", name, sorted(entries))
    try:
        factory = entries[name].load()
        backend: Backend = factory()
    except ImportError as error:
        raise TpcheckError(f"backend {name!r} cannot be loaded: {error}") from error
    return backend


def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
