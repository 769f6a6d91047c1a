"""What ranks are told of this session's pytest configuration."""

from __future__ import annotations

import pickle
import sys
from contextlib import suppress
from typing import Any

import pytest

from tpcheck.pytest_plugin.messages import PytestSettings
from tpcheck.world.pickling import dumps

# What the import hook and the explanations of asserts ask for; older versions of pytest lack some.
_INI = (
    *("assertion_text_diff_style", "consider_namespace_packages", "enable_assertion_pass_hook", "python_files"),
    *("truncation_limit_chars", "truncation_limit_lines", "verbosity_assertions"),
)
_pickled_key = pytest.StashKey[bytes]()


def pickled_settings(config: pytest.Config) -> bytes:
    """Return the pickled `PytestSettings` of the session, made once."""
    if _pickled_key not in config.stash:
        config.stash[_pickled_key] = dumps(_settings(config))
    return config.stash[_pickled_key]


def _settings(config: pytest.Config) -> PytestSettings:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    return PytestSettings(
        rootpath=str(config.rootpath),
        invocation_dir=str(config.invocation_params.dir),
        options={name: value for name, value in vars(config.option).items() if _is_plain(value)},
        ini=_ini(config),
        rewritten=_rewritten(config),
        has_markup=terminal is not None and bool(terminal._tw.hasmarkup),
    )


def _ini(config: pytest.Config) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in _INI:
        with suppress(KeyError, ValueError):
            values[name] = config.getini(name)
    return values


def _rewritten(config: pytest.Config) -> tuple[str, ...]:
    """Return what conftests and plugins registered with `pytest.register_assert_rewrite`."""
    hooks = [finder for finder in sys.meta_path if getattr(finder, "config", None) is config]
    return tuple(sorted({name for hook in hooks for name in getattr(hook, "_must_rewrite", ())}))


def _is_plain(value: object) -> bool:
    """Tell whether ranks can load the value: by plain pickle, which reaches for no code of other plugins."""
    try:
        return bool(pickle.loads(pickle.dumps(value)) == value)
    except Exception:
        return False
