"""Sizes that make the configuration of a real model small and keep what tensor parallelism depends on. No torch.

What stays: how each number of heads, experts and features divides by the TP size, query heads for each key-value head,
experts for each one that is chosen, every kind of layer, the part of a head that is rotated, and whether the heads
together are as wide as the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any

from tpcheck.families.rules import (
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    LEADING_LAYERS,
    POSITIONS,
    ROLES,
    SIZES,
    VOCABULARY,
    is_size,
    layer_count_name,
    small_settings,
)

_MOST_QUERIES = 8  # heads for each key-value head: more of them only make the model wider
_MOST_EXPERTS = 32  # each is a loop of its own
_LEAST_HIDDEN = 16
_CHOSEN_EXPERTS = "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts".split()
_OTHER_HEADS = (  # of attention layers beside the usual ones: heads, key-value heads
    ("linear_num_value_heads", "linear_num_key_heads"),
    ("swa_num_attention_heads", "swa_num_key_value_heads"),
)
_MIXER_HEADS = ("mamba_n_heads", "mamba_num_heads", "linear_num_heads")  # times their dim: the expanded hidden size
_TRAILING_LAYERS = ("num_kv_shared_layers",)
_PERIOD = re.compile(r"(_step|_period|_interval|_freq|_frequency|_pattern|_every_n\w*)$")
_LAYER_INDICES = re.compile(r"layer|_offset$|_idx|_ids$")
_SMALL_IN_LAYER = {"head_dim": 2 * HEAD_DIM}  # of a kind of layer whose heads are wider than those of the others
_SAME_COUNT = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers")


def proportional_settings(
    real: Mapping[str, Any], *, tp: int, of_type: Mapping[str, Any], is_decoder: bool = True
) -> dict[str, Any]:
    """Return the attributes of a real configuration to change, with their small values.

    Args:
        real: Every attribute of the configuration; nested configurations are skipped.
        tp: The TP size of the run.
        of_type: What `rules.OVERRIDES` has for the model type; of it, only sizes that are smaller apply.
        is_decoder: As for `rules.small_settings`.

    Example:
        >>> real = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
        >>> small = proportional_settings(real, tp=8, of_type={})
        >>> small["num_attention_heads"], small["num_key_value_heads"], small["hidden_size"]
        (32, 8, 256)
        >>> small = proportional_settings(real, tp=2, of_type={})
        >>> small["num_attention_heads"], small["num_key_value_heads"], small["hidden_size"]
        (16, 4, 128)
    """
    small = small_settings(real, is_decoder=is_decoder)
    small = {name: value for name, value in small.items() if real.get(name) is not None}  # unset has a meaning
    small |= {
        name: value
        for name, value in of_type.items()
        if is_size(value) and is_size(real.get(name)) and not _LAYER_INDICES.search(name) and not _PERIOD.search(name)
    }
    heads = _attention_heads(real, tp)
    small |= heads
    small |= _widths(real, heads, tp)
    small |= _features(real, tp)
    small |= _experts(real, tp)
    small |= _layers(real, least=of_type.get(layer_count_name(real) or ""))
    return {name: _not_larger(value, real[name]) for name, value in small.items()}


def _not_larger(value: Any, real: Any) -> Any:
    return min(value, real) if is_size(value) and is_size(real) else value


def same_division(value: int, tp: int, *, least: int) -> int:
    """Return the smallest size from `least` on that TP divides as it divides `value`; at most `value`.

    Example:
        >>> same_division(151936, 8, least=128), same_division(50257, 2, least=128), same_division(6, 4, least=4)
        (128, 129, 6)
    """
    sizes = range(least, value)
    return next((size for size in sizes if gcd(size, tp) == gcd(value, tp) and size % 2 == value % 2), value)


def _heads(heads: int, kv_heads: int, tp: int) -> tuple[int, int]:
    """Return small numbers of query and key-value heads: two or more on each rank where the real model has them."""
    ratio, rest = divmod(heads, kv_heads)
    if rest:
        return heads, kv_heads
    for small_kv in range(min(kv_heads, 2 * gcd(kv_heads, tp)), kv_heads + 1):
        if gcd(small_kv, tp) != gcd(kv_heads, tp):
            continue
        for small_ratio in range(min(ratio, _MOST_QUERIES), ratio + 1):
            if gcd(small_kv * small_ratio, tp) == gcd(heads, tp):
                return small_kv * small_ratio, small_kv
    return heads, kv_heads


def _of_role(real: Mapping[str, Any], role: str) -> dict[str, int]:
    return {name: real[name] for name in ROLES if ROLES[name] == role and is_size(real.get(name))}


def _first(sizes: Mapping[str, int], default: int) -> int:
    return next(iter(sizes.values()), default)


def _attention_heads(real: Mapping[str, Any], tp: int) -> dict[str, int]:
    """Return the numbers of heads of every kind of attention."""
    heads, kv_heads = _of_role(real, "heads"), _of_role(real, "kv_heads")
    num_heads = _first(heads, HEADS)
    num_kv = _first(kv_heads, num_heads)
    small_heads, small_kv = _heads(num_heads, num_kv, tp)
    small = {name: small_heads if n == num_heads else _heads(n, n, tp)[0] for name, n in heads.items()}
    small |= {name: small_kv if n == num_kv else _heads(n, n, tp)[0] for name, n in kv_heads.items()}
    for of_queries, of_keys in _OTHER_HEADS:
        if is_size(real.get(of_queries)) and is_size(real.get(of_keys)):
            small[of_queries], small[of_keys] = _heads(real[of_queries], real[of_keys], tp)
    return small


def _widths(real: Mapping[str, Any], small_heads: Mapping[str, int], tp: int) -> dict[str, Any]:
    """Return the hidden sizes, the dims of heads, and what follows from these."""
    hidden, heads = _of_role(real, "hidden"), _of_role(real, "heads")
    if not hidden or not heads:
        return {}
    width, num_heads = _first(hidden, HIDDEN), _first(heads, HEADS)
    head_dim = _first(_of_role(real, "head_dim"), width // num_heads)
    small_dim = _head_dim(real, head_dim)
    small_width = small_heads[next(iter(heads))] * small_dim
    if head_dim * num_heads != width:
        wanted = small_width * width / (head_dim * num_heads)
        small_width = same_division(width, tp, least=max(_LEAST_HIDDEN, 8 * round(wanted / 8)))
    others = {
        name: small_width * value // width
        for name, value in real.items()
        if ROLES.get(name) in ("hidden", "width") and is_size(value)
    }
    small: dict[str, Any] = {name: value for name, value in others.items() if value > 0}
    small |= {name: small_width // 8 for name in _MIXER_HEADS if is_size(real.get(name))}
    if is_size(real.get("mamba_d_ssm")):
        small["mamba_d_ssm"] = 2 * small_width
    return small | _of_head(real, head_dim, small_dim)


def _rotated_parts(real: Mapping[str, Any]) -> list[float]:
    """Return the parts of a head that are rotated, for each kind of layer that names one."""
    ropes = real.get("rope_parameters") or real.get("rope_scaling") or {}
    sources = [real, ropes, *(ropes.values() if isinstance(ropes, Mapping) else ())]
    names = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
    parts = (source.get(name) for source in sources if isinstance(source, Mapping) for name in names)
    return [part for part in parts if isinstance(part, float)]


def _head_dim(real: Mapping[str, Any], head_dim: int) -> int:
    """Return the smallest dim of which every rotated part consists of pairs."""
    parts = _rotated_parts(real)
    sizes = range(HEAD_DIM, head_dim, 2)
    return next((n for n in sizes if all(int(n * part) >= 2 and int(n * part) % 2 == 0 for part in parts)), head_dim)


def _of_head(real: Mapping[str, Any], head_dim: int, small_dim: int) -> dict[str, Any]:
    """Return what counts features of a head: its dim, the rotated ones, and sections of these."""
    small: dict[str, Any] = {
        name: small_dim
        for name, value in real.items()
        if value == head_dim and (ROLES.get(name) in ("head_dim", "dim") or name == "query_pre_attn_scalar")
    }
    if is_size(real.get("rotary_dim")):
        small["rotary_dim"] = max(2, 2 * round(small_dim * real["rotary_dim"] / head_dim / 2))
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(real.get(name), Mapping):
            small[name] = _small_rope(real[name], small_dim / head_dim)
    return small


def _small_rope(rope: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return the parameters of rotary embeddings for heads that are smaller by this factor."""
    small = dict(rope)
    for name, value in rope.items():
        if isinstance(value, Mapping):  # one for each kind of layer
            small[name] = _small_rope(value, factor)
        elif name == "original_max_position_embeddings" and is_size(value):
            small[name] = min(value, POSITIONS // 2)
        elif name == "mrope_section" and isinstance(value, (list, tuple)):
            small[name] = _sections(value, factor)
        elif isinstance(value, (list, tuple)) and name.endswith("_factor"):  # one for each pair of features
            number = max(1, round(len(value) * factor))
            small[name] = [value[index * len(value) // number] for index in range(number)]
    return small


def _sections(sections: Sequence[int], factor: float) -> list[int]:
    """Return sections that are smaller by this factor, one or more each, with the same sum as the small head has."""
    total = round(sum(sections) * factor)
    small = [max(1, int(section * factor)) for section in sections]
    while sum(small) != total and (sum(small) < total or max(small) > 1):
        step = 1 if sum(small) < total else -1
        small[small.index(max(small)) if step < 0 else len(small) - 1] += step
    return small


def _features(real: Mapping[str, Any], tp: int) -> dict[str, int]:
    """Return the widths of feed-forward layers and the vocabulary."""
    widest = max(_of_role(real, "intermediate").values(), default=0)
    small = {
        name: same_division(value, tp, least=INTERMEDIATE if value == widest else INTERMEDIATE // 2)
        for name, value in _of_role(real, "intermediate").items()
    }
    vocabularies = _of_role(real, "vocabulary")
    return small | {name: same_division(value, tp, least=VOCABULARY) for name, value in vocabularies.items()}


def _experts(real: Mapping[str, Any], tp: int) -> dict[str, int]:
    """Return the numbers of experts, of which a token chooses the same part."""
    chosen = {name: real[name] for name in _CHOSEN_EXPERTS if is_size(real.get(name))}
    small = {name: min(2, value) for name, value in chosen.items()}
    for name, value in _of_role(real, "experts").items():
        part = value // max(1, _first(chosen, 1))
        least = min(_MOST_EXPERTS, part * _first(small, 1)) if chosen else EXPERTS
        small[name] = same_division(value, tp, least=max(2, least))
    return small


def _layers(real: Mapping[str, Any], least: int | None) -> dict[str, Any]:
    """Return the number of layers and what is set for each of them: every kind of layer that the model has stays.

    Where layers alternate by a period the small model has the first ones up to the last new kind, else one of each.
    """
    name = layer_count_name(real)
    if name is None:
        return {}
    number = real[name]
    lists = {
        key: value for key, value in real.items()
        if isinstance(value, (list, tuple)) and len(value) == number > 1 and list(value) != list(range(number))
    }  # fmt: skip
    indices = {key: value for key, value in real.items() if key not in lists and _lists_layers(key, value, number)}
    leading = {key: real[key] for key in LEADING_LAYERS if is_size(real.get(key))}
    by_layer = {key: dict(value) for key, value in real.items() if _is_by_layer(value, number)}
    trailing = {key: real[key] for key in _TRAILING_LAYERS if is_size(real.get(key))}
    periods = [v for key, v in real.items() if _PERIOD.search(key) and is_size(v) and 1 < v <= number and key != name]
    kinds = [
        repr((
            [value[layer] for value in lists.values()],
            [layer in value for value in indices.values()],
            [_of_layer(value, layer) for value in by_layer.values()],
            [layer < value for value in leading.values()],
            [layer >= number - value for value in trailing.values()],
            [layer % period for period in periods],
        ))
        for layer in range(number)
    ]  # fmt: skip
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    kept = list(range(firsts[-1] + 1)) if periods else firsts
    kept += [firsts[-1]] * (min(number, max(LAYERS, least or 0)) - len(kept))
    return {
        **{key: len(kept) for key in (name, *_SAME_COUNT) if real.get(key) == number},
        **{key: [SIZES.get(key, value[layer]) for layer in kept] for key, value in lists.items()},
        **{key: [new for new, layer in enumerate(kept) if layer in value] for key, value in indices.items()},
        **{
            key: {new: entry for new, layer in enumerate(kept) if (entry := _of_layer(value, layer)) is not None}
            for key, value in by_layer.items()
        },
        **{key: sum(layer < value for layer in kept) for key, value in leading.items()},
        **{key: sum(layer >= number - value for layer in kept) for key, value in trailing.items()},
    }


def _is_by_layer(value: Any, number: int) -> bool:
    """Return whether an attribute maps indices of layers, as numbers or text, to what is set for these."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(str(key).isdecimal() and int(key) < number and isinstance(value[key], Mapping) for key in value)


def _of_layer(by_layer: Mapping[Any, Any], layer: int) -> Any:
    """Return what is set for a layer, with small sizes; None where nothing is."""
    entry = next((value for key, value in by_layer.items() if int(key) == layer), None)
    return entry and {name: _SMALL_IN_LAYER.get(name, SIZES.get(name, value)) for name, value in entry.items()}


def _lists_layers(name: str, value: Any, number: int) -> bool:
    """Return whether an attribute lists the indices of some layers."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and bool(_LAYER_INDICES.search(name))
        and "token" not in name
        and all(isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < number for layer in value)
    )
