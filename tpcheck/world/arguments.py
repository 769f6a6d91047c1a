"""What a world may be asked for: every argument of `spawn` that needs no look at this machine's devices."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from tpcheck.errors import UsageError
from tpcheck.world.preload import DEFAULT

_MAX_SEED = 2**64 - 1  # what torch.manual_seed takes


def checked_timeout(timeout: Any) -> float | None:
    """Return seconds above 0, infinity included, or None: both are no limit.

    Raises:
        UsageError: It is neither.
    """
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool) or not timeout > 0:
        raise UsageError("timeout", timeout, "seconds above 0, or None for no limit")
    return float(timeout)


def checked_seed(seed: Any) -> int | None:
    """Return a seed that Python, NumPy and torch all take, or None.

    Raises:
        UsageError: It is neither.
    """
    if seed is None or (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed <= _MAX_SEED):
        return seed
    raise UsageError("seed", seed, "an integer from 0 to 2**64 - 1, or None for another seed on every rank")


def checked_env(env: Any) -> dict[str, str]:
    """Return the variables.

    Raises:
        UsageError: They are no mapping, or the operating system would not take one of them.
    """
    if env is None:
        return {}
    if not isinstance(env, Mapping):
        raise UsageError("env", env, "a mapping of variables to their values, both text")
    for name, value in env.items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise UsageError("env", {name: value}, "names of variables: text without =")
        if not isinstance(value, str) or "\0" in value or not _is_encodable(name + value):
            raise UsageError("env", {name: value}, f"text as the value of {name}")
    return dict(env)


def checked_preload(preload: Any) -> tuple[str, ...] | None:
    """Return the names of modules to import, or None.

    Raises:
        UsageError: They are not a sequence of names, or one of the caller's own is not installed.
    """
    if preload is None:
        return None
    names = checked_modules("preload", preload)
    for name in names:
        if name not in DEFAULT and not _is_installed(name.partition(".")[0]):
            raise UsageError("preload", name, "modules that are installed")
    return names


def checked_modules(argument: str, names: Any) -> tuple[str, ...]:
    """Return names of modules, which need not be installed.

    Raises:
        UsageError: They are not a sequence of names.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UsageError(argument, names, 'a sequence of module names, such as ["torch"]')
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(argument, name, "names of modules")
    return tuple(names)


def refuse_broken(preload: Sequence[str] | None, broken: Mapping[str, str]) -> None:
    """Refuse a module of the caller's own choice that could not be imported; others are left for ranks that need them.

    Raises:
        UsageError: There is one.
    """
    for name in preload or ():
        if name in broken and name not in DEFAULT:
            raise UsageError("preload", name, f"modules that can be imported ({broken[name]})")


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a module that was made by hand, `__main__` for one
        return True
