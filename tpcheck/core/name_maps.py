"""Names of modules and parameters: in the words of another model (patterns, ready maps, fusions), and of siblings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from tpcheck.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Fusion:
    """Parameters or modules that other frameworks keep in one.

    Attributes:
        fused: Pattern of the fused one's name, with one group.
        parts: Templates of the names of what it is made of; `{}` is that group.
    """

    fused: str
    parts: tuple[str, ...]

    def parts_of(self, name: str) -> tuple[str, ...]:
        """Return the names of the parts; empty where the name is not that of a fused one."""
        matched = re.fullmatch(self.fused, name)
        return tuple(part.format(matched.group(1)) for part in self.parts) if matched else ()


@dataclass(frozen=True, slots=True)
class NameMap:
    """Renames modules and parameters before two runs, or two checkpoints, are compared.

    Attributes:
        actual: Patterns and replacements, as for `re.sub`, for names of the side that is judged, in their order.
        both: The same for names of both sides.
        fusions: What one side may have fused.
        texts: As `--map` takes them.
    """

    actual: tuple[tuple[str, str], ...] = ()
    both: tuple[tuple[str, str], ...] = ()
    fusions: tuple[Fusion, ...] = ()
    texts: tuple[str, ...] = ()
    _cache: dict[tuple[bool, str], str] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, patterns: Mapping[str, str] | None = None, ready: Sequence[str] = ()) -> NameMap:
        """Return the map of these patterns, and of ready ones by their names.

        Raises:
            UsageError: A pattern is no regular expression, or there is no ready map of a name.
        """
        actual = tuple((patterns or {}).items())
        for pattern, replacement in actual:
            _substitute(pattern, replacement, "")
        for name in ready:
            if name not in READY_MAPS:
                raise UsageError("map", name, f"REGEX=REPLACEMENT or one of {', '.join(READY_MAPS)}")
        maps = [READY_MAPS[name] for name in ready]
        return cls(
            actual,
            tuple(pair for each in maps for pair in each.both),
            tuple(fusion for each in maps for fusion in each.fusions),
            (*(f"{pattern}={replacement}" for pattern, replacement in actual), *ready),
        )

    @classmethod
    def from_argument(cls, names: Names) -> NameMap:
        """Return the map that the caller of a public function gave.

        Raises:
            UsageError: It is none.
        """
        if isinstance(names, NameMap):
            return names
        if not isinstance(names, (Mapping, Sequence, type(None))) or isinstance(names, str):
            raise UsageError("names", names, "patterns with their replacements, or a list of names of ready maps")
        return cls.of(names) if isinstance(names, Mapping) else cls.of(ready=names or ())

    def renamed(self, name: str, *, is_actual: bool) -> str:
        """Return the name by which both runs' tensors are looked up.

        Raises:
            UsageError: A replacement refers to a group that its pattern lacks.
        """
        key = (is_actual, name)
        if key not in self._cache:
            new_name = name
            for pattern, replacement in (*self.both, *(self.actual if is_actual else ())):
                new_name = _substitute(pattern, replacement, new_name)
            self._cache[key] = new_name
        return self._cache[key]

    def idle_pattern(self, names: Iterable[str]) -> str | None:
        """Return the first pattern for the actual side that none of its names matches, as `--map` takes it."""
        current = list(names)
        for pattern, replacement in self.both:
            current = [_substitute(pattern, replacement, name) for name in current]
        for pattern, replacement in self.actual:
            if not any(re.search(pattern, name) for name in current):
                return f"{pattern}={replacement}"
            current = [_substitute(pattern, replacement, name) for name in current]
        return None

    def fused_from(self, name: str) -> tuple[str, ...]:
        """Return the names of the parts of a fused parameter or module; empty where it is none."""
        return next((parts for fusion in self.fusions if (parts := fusion.parts_of(name))), ())


Names: TypeAlias = NameMap | Mapping[str, str] | Sequence[str] | None
"""A map, or what one is made of: patterns with their replacements, or names of ready maps."""


def _substitute(pattern: str, replacement: str, name: str) -> str:
    try:
        return re.sub(pattern, replacement, name)
    except (re.error, IndexError) as error:
        raise UsageError(
            "map", f"{pattern}={replacement}", f"a pattern and a replacement of `re.sub` ({error})"
        ) from error


def parse_maps(values: Sequence[str]) -> NameMap:
    """Return the map of `--map` options: `REGEX=REPLACEMENT`, or the name of a ready map.

    Raises:
        UsageError: A value is neither.

    Example:
        >>> parse_maps(["^net[.]=model."]).renamed("net.0.weight", is_actual=True)
        'model.0.weight'
    """
    patterns: dict[str, str] = {}
    ready: list[str] = []
    for value in values:
        pattern, equals, replacement = value.rpartition("=")
        if equals:
            patterns[pattern] = replacement
        else:
            ready.append(value)
    return NameMap.of(patterns, ready)


# Names of megatron-core's GPTModel (0.16, local and Transformer Engine specs) in those of transformers' Llama.
_MEGATRON_GPT = (
    (r"^(?:module\.)*decoder\.layers\.(\d+)", r"model.layers.\1"),
    (r"^(?:module\.)*decoder\.final_layernorm", "model.norm"),
    (r"^(?:module\.)*embedding\.word_embeddings", "model.embed_tokens"),
    (r"^(?:module\.)*output_layer", "lm_head"),
    (r"^(?:module\.)*decoder$", "model"),
    (r"\.self_attention\.linear_qkv\.layer_norm_(weight|bias)$", r".input_layernorm.\1"),
    (r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)$", r".post_attention_layernorm.\1"),
    (r"\.pre_mlp_layernorm", ".post_attention_layernorm"),
    (r"\.self_attention\.linear_proj", ".self_attn.o_proj"),
    (r"\.self_attention\.q_layernorm", ".self_attn.q_norm"),
    (r"\.self_attention\.k_layernorm", ".self_attn.k_norm"),
    (r"\.self_attention\.linear_qkv", ".self_attn.qkv_proj"),
    (r"\.self_attention", ".self_attn"),
    (r"\.mlp\.linear_fc1", ".mlp.gate_up_proj"),
    (r"\.mlp\.linear_fc2", ".mlp.down_proj"),
)
FUSED_PARAMETERS = (
    Fusion(r"(.*\.self_attn\.)qkv_proj\.weight", ("{}q_proj.weight", "{}k_proj.weight", "{}v_proj.weight")),
    Fusion(r"(.*\.self_attn\.)qkv_proj\.bias", ("{}q_proj.bias", "{}k_proj.bias", "{}v_proj.bias")),
    Fusion(r"(.*\.mlp\.)gate_up_proj\.weight", ("{}gate_proj.weight", "{}up_proj.weight")),
    Fusion(r"(.*\.mlp\.)gate_up_proj\.bias", ("{}gate_proj.bias", "{}up_proj.bias")),
)
"""Parameters that some models keep in one, under the names that transformers gives both kinds."""

_FUSED_MODULES = (
    Fusion(r"(.*\.self_attn\.)qkv_proj", ("{}q_proj", "{}k_proj", "{}v_proj")),
    Fusion(r"(.*\.mlp\.)gate_up_proj", ("{}gate_proj", "{}up_proj")),
)
_FUSED_GPT = (*FUSED_PARAMETERS, *_FUSED_MODULES)

READY_MAPS: Mapping[str, NameMap] = {"hf-megatron": NameMap(both=_MEGATRON_GPT, fusions=_FUSED_GPT)}


def without_numbers(name: str) -> str:
    """Return the name with `#` for each number, which it shares with its siblings in other layers.

    Example:
        >>> without_numbers("model.layers.12.mlp.up_proj.weight")
        'model.layers.#.mlp.up_proj.weight'
    """
    return re.sub(r"\d+", "#", name)
