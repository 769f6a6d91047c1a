"""What can be varied in a family's configuration: its sizes by role, and its switches. transformers at first use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpcheck.families.build import small_config
from tpcheck.families.rules import ROLES
from tpcheck.families.settings import attributes, declared

# Switches that say nothing of a training step: caches of generation, and what kind of model it is built as.
_OTHER_SWITCHES = ("use_cache", "is_decoder", "is_encoder_decoder", "add_cross_attention")
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What the configuration of one family has.

    Attributes:
        names: Settings that hold each role's size (`heads`, `kv_heads`, `head_dim`, `hidden`, `intermediate`, `layers`,
            `experts`, `vocabulary`), for those roles that there are.
        switches: Settings that are true or false, and what they are.
        least_vocabulary: The smallest vocabulary that holds every special token.
    """

    names: Mapping[str, tuple[str, ...]]
    switches: Mapping[str, bool]
    least_vocabulary: int

    def settings(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the settings that give each role its size."""
        return {name: size for role, size in sizes.items() for name in self.names.get(role, ())}


def dimensions(family: str, settings: Mapping[str, object] | None = None) -> Dimensions:
    """Return what can be varied in a family whose other settings are these.

    Raises:
        UsageError: No such family or setting.
    """
    config = small_config(family, settings)
    text = config.get_text_config()
    path = "" if text is config else _path_of(text, config)
    known = attributes(text)
    names: dict[str, tuple[str, ...]] = {}
    for name, role in ROLES.items():
        if _is_size(known.get(name)):
            names[role] = (*names.get(role, ()), path + name)
    return Dimensions(names, _switches(type(text), known, path), _least_vocabulary(known))


def _path_of(text: Any, config: Any) -> str:
    return next(f"{name}." for name in config.sub_configs if getattr(config, name, None) is text)


def _switches(config_class: type, known: Mapping[str, Any], path: str) -> dict[str, bool]:
    """Return the switches that the type declares itself; those that every type has are about generation and output."""
    from transformers import PreTrainedConfig

    of_every_type = declared(PreTrainedConfig)
    return {
        path + name: value
        for name, value in known.items()
        if isinstance(value, bool) and name[0] != "_" and name not in of_every_type and name not in _OTHER_SWITCHES
    }


def _least_vocabulary(known: Mapping[str, Any]) -> int:
    ids = [known.get(name) for name in _TOKEN_IDS]
    return 1 + max((one for one in ids if isinstance(one, int)), default=0)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
