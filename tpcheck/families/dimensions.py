"""The sizes and switches of a family's configuration that can be varied. Imports transformers at first use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpcheck.families.build import small_config
from tpcheck.families.rules import ROLES
from tpcheck.families.settings import attributes, declared

# Switches without effect on a training step: caches of generation, and the kind of model.
_OTHER_SWITCHES = ("use_cache", "is_decoder", "is_encoder_decoder", "add_cross_attention")
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The sizes and switches of one family.

    Attributes:
        names: Names of the settings of each role that the family has: `heads`, `kv_heads`, `head_dim`, `hidden`,
            `intermediate`, `layers`, `experts`, `vocabulary`.
        switches: Boolean settings and their values.
        least_vocabulary: The smallest vocabulary that contains every special token.
    """

    names: Mapping[str, tuple[str, ...]]
    switches: Mapping[str, bool]
    least_vocabulary: int

    def settings(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the settings that give each role its size."""
        return {name: size for role, size in sizes.items() for name in self.names.get(role, ())}


def dimensions(family: str, settings: Mapping[str, object] | None = None) -> Dimensions:
    """Return the dimensions of a family with these settings.

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
    """Return the switches that the type declares itself; those of every type concern generation and output."""
    from transformers import PreTrainedConfig

    of_every_type = declared(PreTrainedConfig)
    return {
        path + name: value
        for name, value in known.items()
        if isinstance(value, bool) and name[0] != "_" and name not in of_every_type and name not in _OTHER_SWITCHES
    }


def _least_vocabulary(known: Mapping[str, Any]) -> int:
    ids = [known.get(name) for name in _TOKEN_IDS]
    return 1 + max((token for token in ids if isinstance(token, int)), default=0)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
