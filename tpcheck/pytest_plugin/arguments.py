"""Fixture values and drawn examples, made ready to travel to the ranks; what cannot is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpcheck.errors import UsageError
from tpcheck.pytest_plugin.fixtures import STAY_BEHIND, RankPlaceholder
from tpcheck.pytest_plugin.messages import Argument
from tpcheck.world.pickling import dumps


def packed_arguments(arguments: Mapping[str, Any]) -> bytes:
    """Return the arguments as bytes, by name; pickled together, so that what two share they share on the ranks.

    Raises:
        UsageError: An argument cannot follow; says which and why.
    """
    for name, value in arguments.items():
        if name in STAY_BEHIND:
            raise UsageError(name, value, f"a fixture that can be sent to the ranks: {STAY_BEHIND[name]}")
    own = {name: _own(value) for name, value in arguments.items()}
    try:
        return dumps(own)
    except Exception as error:
        raise _culprit(own, "argument or fixture", error) from error


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
            return UsageError(name, value, _sendable(what, value, own_error))
    return UsageError("arguments", tuple(values), _sendable(what, None, error))


def _why_not(value: Any) -> Exception | None:
    try:
        dumps(value)
    except Exception as error:
        return error
    return None


def _sendable(what: str, value: Any, error: Exception) -> str:
    if type(value).__module__.startswith("hypothesis."):
        return "a value: Hypothesis draws in pytest's process alone, so name every strategy in @given"
    return (
        f"an {what} that pickles, because it is made in pytest's process and sent to the ranks; "
        f"build it in the body instead ({type(error).__name__}: {error})"
    )
