"""Small models of every model type of transformers, their configurations, and the sizes that can be varied."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tpcheck.core.errors import TpcheckError, UsageError
from tpcheck.core.guides import Guide
from tpcheck.core.installed_source import keys_of
from tpcheck.families.rules import (
    OVERRIDES,
    ROLES,
    SPECIAL_TOKENS,
    is_size,
    layer_count_name,
    rotary_sections,
    small_settings,
)
from tpcheck.families.settings import attributes, canonical, declared, nest, overlay, unknown

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Head:
    """A kind of model.

    Attributes:
        name: What follows the slash in `bart/seq2seq`.
        auto_class: The class of transformers that builds it.
        mapping: The table of transformers that names its types.
    """

    name: str
    auto_class: str
    mapping: str


# A type with several heads gets the first, unless its name selects another.
HEADS = (
    Head("causal", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    Head("seq2seq", "AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    Head("masked", "AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    Head("multimodal", "AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
)
CAUSAL, SEQ2SEQ = HEADS[:2]


_AUTO = "transformers.models.auto.modeling_auto"


def types_of(head: Head) -> tuple[str, ...]:
    """Return every model type of the installed transformers with this head.

    Raises:
        TpcheckError: transformers is not installed.
    """
    is_imported = _AUTO in sys.modules  # on ranks, where parsing its source would take a tenth of their time
    if not is_imported and (of_source := keys_of(_AUTO, head.mapping)):  # without seconds of imports
        return tuple(sorted(of_source))
    try:
        from transformers.models.auto import modeling_auto
    except ImportError as error:
        raise TpcheckError("families need transformers: pip install 'tpcheck[transformers]'") from error
    names: Mapping[str, object] = getattr(modeling_auto, head.mapping, {})
    return tuple(sorted(names))


def is_type(name: str) -> bool:
    """Return whether the installed transformers has this language model type, with any head."""
    return any(name in types_of(head) for head in HEADS)


def type_and_head(family: str) -> tuple[str, Head]:
    """Return the model type and the head of a family such as `t5` or `bart/seq2seq`.

    Raises:
        UsageError: transformers has no such type, or it has no such head.
    """
    name, slash, wanted = family.partition("/")
    of_type = [head for head in HEADS if name in types_of(head)]
    if not of_type:
        known = {known for head in HEADS for known in types_of(head)}
        accepted = unknown("a language model type of transformers", name, known)
        raise UsageError("family", family, accepted, Guide.WHICH_MODELS)
    if not slash:
        return name, of_type[0]
    for head in of_type:
        if head.name == wanted:
            return name, head
    raise UsageError("family", family, [f"{name}/{head.name}" for head in of_type])


@dataclass(frozen=True, slots=True)
class FolderModel:
    """A model as it is built from a configuration of the user's; see `folders.read_folder`.

    Attributes:
        target: What the user gave: a folder, its config.json, or a hub id.
        family: Its model type, with the head where that is not the type's first: `bert/masked`.
        config: The whole configuration to build, as its file would hold it.
        shrunk: The sizes that were made smaller, by dotted name: the real one and the small one.
        notes: What else of the folder does not take part, in sentences.
    """

    target: str
    family: str
    config: Mapping[str, Any] = field(hash=False)
    shrunk: Mapping[str, tuple[Any, Any]] = field(hash=False)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.target


# Grouped matrix products do not support float64; fused attention kernels treat masks and ALiBi differently.
_IMPLEMENTATIONS = {"attn_implementation": "eager", "experts_implementation": "eager"}


def small_model(family: str | FolderModel, settings: Mapping[str, object] | None = None) -> nn.Module:
    """Return a small randomly initialised language model of a transformers model type, or of a configuration.

    Args:
        family: A model type of transformers, such as `llama` or `t5`; `/seq2seq`, `/masked` or `/multimodal` selects
            the head of a type with several. A `FolderModel` has the user's settings already.
        settings: Changes to the small configuration; dots reach nested ones (`text_config.head_dim`).

    Raises:
        UsageError: No such family or setting, or no model can be built from these settings.
    """
    settings = settings or {}
    implementations = {name: settings.get(name, default) for name, default in _IMPLEMENTATIONS.items()}
    config = small_config(family, {name: value for name, value in settings.items() if name not in implementations})
    import transformers

    try:
        head = type_and_head(family.family if isinstance(family, FolderModel) else family)[1]
        if head is SEQ2SEQ and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 0  # files of trained models have it; the defaults of some types do not
        model: nn.Module = getattr(transformers, head.auto_class).from_config(config, **implementations)
    except Exception as error:
        raise _cannot_be_built(family, error) from error
    return model


def small_config(family: str | FolderModel, settings: Mapping[str, object] | None = None) -> Any:
    """Return the small configuration of a family with the user's settings over it; see `small_model`."""
    wanted = nest(settings or {})
    name, head = type_and_head(family.family if isinstance(family, FolderModel) else family)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        if isinstance(family, FolderModel):
            return CONFIG_MAPPING[name].from_dict(dict(family.config))
        return _shrink(CONFIG_MAPPING[name], OVERRIDES.get(name, {}), wanted, is_decoder=head is CAUSAL)
    except UsageError:
        raise
    except Exception as error:
        raise _cannot_be_built(family, error) from error


def causal_types() -> tuple[str, ...]:
    """Return every causal language model type of the installed transformers."""
    return types_of(CAUSAL)


def _shrink(
    config_class: Any,
    overrides: Mapping[str, Any],
    wanted: Mapping[str, Any],
    path: tuple[str, ...] = (),
    *,
    is_decoder: bool = True,
) -> Any:
    default = _default(config_class, overrides)
    known = attributes(default)
    wanted = canonical(default, wanted, path)
    fixed = overlay(overrides, wanted)
    small = small_settings(known, layers=fixed.get(layer_count_name(known) or ""), is_decoder=is_decoder)
    for name in default.sub_configs:
        if known[name] is not None:
            of_sub = (overrides.get(name, {}), wanted.pop(name, {}), (*path, name))
            small[name] = _shrink(type(known[name]), *of_sub, is_decoder=is_decoder)
            fixed.pop(name, None)
    small |= _rotary_sections(default, {**known, **small, **fixed})
    base = {**known, **small}
    fixed = {name: overlay({name: base.get(name)}, {name: value})[name] for name, value in fixed.items()}
    return config_class(**small | fixed)


def _rotary_sections(default: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of rotary embeddings whose sections fit the small heads, for a type that has sections."""
    rope, wanted = attributes(default).get("rope_parameters"), config.get("rope_parameters")
    if not isinstance(rope, Mapping) or not isinstance(wanted, Mapping):
        return {}
    if "mrope_section" not in (*rope, *getattr(default, "ignore_keys_at_rope_validation", ())):
        return {}
    whole = overlay(rope, wanted)
    is_by_layer_type = any(isinstance(value, Mapping) for value in whole.values())  # sections are limits there
    return {} if is_by_layer_type else {"rope_parameters": {**whole, **rotary_sections(config, whole)}}


def _default(config_class: Any, overrides: Mapping[str, Any]) -> Any:
    try:
        return config_class()
    except Exception:  # a type whose own defaults contradict each other
        return config_class(**overrides)


def _cannot_be_built(family: str | FolderModel, error: Exception) -> UsageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(family, FolderModel):
        accepted = f"a configuration that builds once it is small ({type(error).__name__}: {reason})"
        return UsageError("target", family.target, f"{accepted}; --full keeps its sizes, --set changes single ones")
    return UsageError("family", family, f"settings that it can be built from ({type(error).__name__}: {reason})")


@dataclass(frozen=True, slots=True)
class Listed:
    """A family, the head that it gets, and whether transformers has a tensor-parallel plan for it."""

    family: str
    head: str
    has_plan: bool


def listed() -> tuple[Listed, ...]:
    """Return every language model type of the installed transformers, those with the first head first."""
    head_of: dict[str, str] = {}
    for head in HEADS:
        for name in types_of(head):
            head_of.setdefault(name, head.name)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return tuple(Listed(name, head, _has_plan(CONFIG_MAPPING[name])) for name, head in head_of.items())


def _has_plan(config_class: type) -> bool:
    nested = getattr(config_class, "sub_configs", {}).get("text_config")
    return any(getattr(config, "base_model_tp_plan", None) for config in (config_class, nested))


# Switches without effect on a training step: caches of generation, and the kind of model.
_OTHER_SWITCHES = ("use_cache", "is_decoder", "is_encoder_decoder", "add_cross_attention")


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
    path = next((f"{name}." for name in config.sub_configs if getattr(config, name, None) is text), "")
    known = attributes(text)
    names: dict[str, tuple[str, ...]] = {}
    for name, role in ROLES.items():
        if is_size(known.get(name)):
            names[role] = (*names.get(role, ()), path + name)
    tokens = [token for name in SPECIAL_TOKENS if isinstance(token := known.get(name), int)]
    return Dimensions(names, _switches(type(text), known, path), least_vocabulary=1 + max(tokens, default=0))


def _switches(config_class: type, known: Mapping[str, Any], path: str) -> dict[str, bool]:
    """Return the switches that the type declares itself; those of every type concern generation and output."""
    from transformers import PreTrainedConfig

    of_every_type = declared(PreTrainedConfig)
    return {
        path + name: value
        for name, value in known.items()
        if isinstance(value, bool) and name[0] != "_" and name not in of_every_type and name not in _OTHER_SWITCHES
    }
