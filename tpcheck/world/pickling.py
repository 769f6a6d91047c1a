"""The one way that functions, results and exceptions become bytes, lambdas and local classes included."""

from __future__ import annotations

import pickle
from typing import Any


def dumps(value: Any) -> bytes:
    import cloudpickle  # type: ignore[import-untyped]

    pickled: bytes = cloudpickle.dumps(value)
    return pickled


def loads(pickled: bytes) -> Any:
    return pickle.loads(pickled)


def loads_or_none(pickled: bytes | None) -> Any:
    """Return what was pickled, None where this process cannot load it."""
    if pickled is None:
        return None
    try:
        return loads(pickled)
    except Exception:
        return None
