"""What can be said of every family without building it."""

from __future__ import annotations

from dataclasses import dataclass

from tpcheck.families.build import causal_types


@dataclass(frozen=True, slots=True)
class Listed:
    """A family and whether transformers has a tensor-parallel plan for it."""

    family: str
    has_plan: bool


def listed() -> tuple[Listed, ...]:
    """Return every causal language model type of the installed transformers."""
    names = causal_types()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return tuple(Listed(name, _has_plan(CONFIG_MAPPING[name])) for name in names)


def _has_plan(config_class: type) -> bool:
    nested = getattr(config_class, "sub_configs", {}).get("text_config")
    return any(getattr(one, "base_model_tp_plan", None) for one in (config_class, nested))
