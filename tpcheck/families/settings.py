"""Settings of `--set KEY=VALUE` on a configuration: dots, aliases and unknown names. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any

from tpcheck.core.errors import UsageError

_BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def nest(settings: Mapping[str, object]) -> dict[str, Any]:
    """Return settings with dotted keys as a tree.

    Example:
        >>> nest({"text_config.head_dim": 4, "use_cache": True})
        {'text_config': {'head_dim': 4}, 'use_cache': True}

    Raises:
        UsageError: A key is both a value and the parent of one.
    """
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise UsageError("set", key, f"either {parent} as a whole, or its fields, not both")
        if isinstance(branch.get(last), dict):
            raise UsageError("set", key, f"either {last} as a whole, or its fields, not both")
        branch[last] = value
    return tree


def overlay(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `changes`, recursively where both have a mapping."""
    changed = dict(base)
    for name, value in changes.items():
        under = base.get(name)
        changed[name] = overlay(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return changed


def attributes(config: Any) -> dict[str, Any]:
    """Return the constructor arguments of a configuration of transformers, and their values."""
    values = vars(config)  # not getattr, which raises for values that differ by layer
    aliases = config.attribute_map  # a few types declare a name and store it under another
    return {name: values.get(aliases.get(name, name)) for name in declared(config)}


def declared(config: Any) -> tuple[str, ...]:
    """Return the names of the constructor arguments of a configuration or its class, including its bases.

    Early versions of transformers 5 have classes whose constructors name them, later ones dataclasses.
    """
    if is_dataclass(config):
        return tuple(field.name for field in fields(config))
    config_class = config if isinstance(config, type) else type(config)
    constructors = [vars(base)["__init__"] for base in config_class.__mro__[-2::-1] if "__init__" in vars(base)]
    names = [
        name
        for constructor in constructors
        for name, parameter in signature(constructor).parameters.items()
        if parameter.kind in _BY_NAME
    ]
    return tuple(dict.fromkeys(name for name in names if name != "self"))


def canonical(config: Any, wanted: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the wanted settings under the configuration's own names (`n_layer` for GPT-2's `num_hidden_layers`).

    Raises:
        UsageError: The configuration has no such attribute.
    """
    aliases: Mapping[str, str] = config.attribute_map
    known = set(declared(config)) | set(aliases) | {name for name in vars(config) if name[0] != "_"}
    for name in wanted:
        if name not in known:
            raise UsageError(
                "set", ".".join((*path, name)), unknown(f"an attribute of {type(config).__name__}", name, known)
            )
    return {aliases.get(name, name): value for name, value in wanted.items()}


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return a description of the accepted names, with those that are close to `name`."""
    near = get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"{kind}; did you mean {' or '.join(near)}?" if near else kind
