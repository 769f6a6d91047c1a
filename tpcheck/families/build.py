"""From a family's name to a small model of it. transformers is imported at first use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tpcheck.errors import TpcheckError, UsageError
from tpcheck.families.overrides import OVERRIDES
from tpcheck.families.rules import layer_count_name, small_settings
from tpcheck.families.settings import attributes, canonical, nest, overlay, unknown

if TYPE_CHECKING:
    from torch import nn

# Grouped matrix products refuse float64; the fused attention kernels differ in masks and ALiBi.
_IMPLEMENTATIONS = {"attn_implementation": "eager", "experts_implementation": "eager"}


def small_model(family: str, settings: Mapping[str, object] | None = None) -> nn.Module:
    """Return a small randomly initialised causal language model of a transformers model type.

    Args:
        family: A model type of transformers, such as `llama`.
        settings: Changes to the small configuration; dots reach nested ones (`text_config.head_dim`).

    Raises:
        UsageError: No such family or setting, or no model can be built from these settings.
    """
    settings = settings or {}
    implementations = {name: settings.get(name, default) for name, default in _IMPLEMENTATIONS.items()}
    config = small_config(family, {name: value for name, value in settings.items() if name not in implementations})
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_config(config, **implementations)
    except Exception as error:
        raise _cannot_be_built(family, error) from error
    return model


def small_config(family: str, settings: Mapping[str, object] | None = None) -> Any:
    """Return the small configuration of a family with the user's settings over it; see `small_model`."""
    wanted = nest(settings or {})
    config_class = _config_class(family)
    try:
        return _shrink(config_class, OVERRIDES.get(family, {}), wanted)
    except UsageError:
        raise
    except Exception as error:
        raise _cannot_be_built(family, error) from error


def causal_types() -> tuple[str, ...]:
    """Return every causal language model type of the installed transformers."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError as error:
        raise TpcheckError("families need transformers: pip install 'tpcheck[transformers]'") from error

    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def _shrink(
    config_class: Any, overrides: Mapping[str, Any], wanted: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Any:
    default = _default(config_class, overrides)
    known = attributes(default)
    wanted = canonical(default, wanted, path)
    fixed = overlay(overrides, wanted)
    small = small_settings(known, layers=fixed.get(layer_count_name(known) or ""))
    for name in default.sub_configs:
        if known[name] is not None:
            small[name] = _shrink(type(known[name]), overrides.get(name, {}), wanted.pop(name, {}), (*path, name))
            fixed.pop(name, None)
    fixed = {name: overlay({name: known.get(name)}, {name: value})[name] for name, value in fixed.items()}
    return config_class(**small | fixed)


def _default(config_class: Any, overrides: Mapping[str, Any]) -> Any:
    try:
        return config_class()
    except Exception:  # a type whose own defaults contradict each other
        return config_class(**overrides)


def _config_class(family: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = causal_types()
    if family not in names:
        raise UsageError("family", family, unknown("a causal language model type of transformers", family, names))
    return CONFIG_MAPPING[family]


def _cannot_be_built(family: str, error: Exception) -> UsageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UsageError("family", family, f"settings that it can be built from ({type(error).__name__}: {reason})")
