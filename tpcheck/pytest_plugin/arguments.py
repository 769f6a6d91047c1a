"""Fixture values and drawn examples, made ready to travel to the ranks; what cannot is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpcheck.errors import UsageError
from tpcheck.pytest_plugin.fixtures import STAY_BEHIND, RankPlaceholder
from tpcheck.pytest_plugin.messages import Argument
from tpcheck.world.pickling import dumps


def packed_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any], names: tuple[str, ...]) -> bytes:
    """Return `(args, kwargs)` as bytes. `names` are those of the positional ones.

    They are pickled together: what two fixtures share is shared on the ranks, too.

    Raises:
        UsageError: An argument cannot follow; says which and why.
    """
    for name in kwargs:
        if name in STAY_BEHIND:
            raise UsageError(name, kwargs[name], f"a fixture that can be sent to the ranks: {STAY_BEHIND[name]}")
    own = {name: _own(value) for name, value in kwargs.items()}
    positional = tuple(_own(value) for value in args)
    try:
        return dumps((positional, own))
    except Exception as error:
        raise _culprit({**dict(zip(names, positional, strict=False)), **own}, "argument or fixture", error) from error


def packed_instance(attributes: Mapping[str, Any]) -> bytes:
    """Return the attributes of a test's instance as bytes.

    Raises:
        UsageError: One does not pickle; says which and why.
    """
    try:
        return dumps(dict(attributes))
    except Exception as error:
        raise _culprit({f"self.{name}": value for name, value in attributes.items()}, "attribute", error) from error


def _own(value: Any) -> Any:
    return Argument.RANK if isinstance(value, RankPlaceholder) else value


def _culprit(values: Mapping[str, Any], what: str, error: Exception) -> UsageError:
    for name, value in values.items():
        own_error = _why_not(value)
        if own_error is not None:
            return UsageError(name, value, _sendable(what, own_error))
    return UsageError("arguments", tuple(values), _sendable(what, error))


def _why_not(value: Any) -> Exception | None:
    try:
        dumps(value)
    except Exception as error:
        return error
    return None


def _sendable(what: str, error: Exception) -> str:
    return (
        f"an {what} that pickles, because it is made in pytest's process and sent to the ranks; "
        f"build it in the body instead ({type(error).__name__}: {error})"
    )
