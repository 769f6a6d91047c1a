"""Models with adapters of PEFT: which names belong to which adapter, and what of it a saved adapter or model holds.

A model that holds its adapters has `q_proj.base_layer.weight` and `q_proj.lora_A.NAME.weight`; `save_pretrained` writes
`q_proj.lora_A.weight` alone, and merging them `q_proj.weight` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpcheck.backends.checkpoint_format import Checkpoint, MergesAdapters
from tpcheck.checkpoints.mapped import under_names
from tpcheck.numerics.exact.checkpoint_tensor import BitComparer, CheckpointTensor

# Of PEFT 0.21's tuners: each names its parameters by its own prefix (`prefix` of peft/tuners/*/model.py).
_TUNERS = (
    r"(?:lora|ia3|hada|lokr|vera|oft|boft|hra|bone|miss|fourierft|vblora|randlora|road|c3a|shira|delora|poly|ln_tuning|"
    r"trainable_tokens|waveft)_\w+"
)
_TUNED = re.compile(rf"(?P<head>.*\.{_TUNERS})(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?P<tail>\.(?:weight|bias))?")
_SAVED_MODULE = re.compile(r"(?P<head>.*)\.modules_to_save\.(?P<adapter>[^.]+)(?P<tail>\..+)")
_BASE = re.compile(r"\.(base_layer|original_module)(?=\.)")
_KIND = "peft_type"  # in the configuration of a saved adapter
_DORA = "lora_magnitude_vector"  # saved without ".weight"


@dataclass(frozen=True, slots=True)
class AdapterNames:
    """The names of a checkpoint, taken apart.

    Attributes:
        of_adapter: For each adapter the names that `save_pretrained` gives its tensors, with those here.
        of_base: The base model's names without what PEFT inserted, with those here.
        holds_base: Whether the base model's weights are beside the adapters; an adapter that PEFT saved may hold some
            of them, such as the embeddings.
    """

    of_adapter: Mapping[str, Mapping[str, str]]
    of_base: Mapping[str, str]
    holds_base: bool

    @classmethod
    def of(cls, names: Sequence[str], *, is_saved_adapter: bool = False) -> AdapterNames:
        of_adapter: dict[str, dict[str, str]] = {}
        of_base: dict[str, str] = {}
        for name in names:
            adapter, saved = _taken_apart(name)
            (of_base if adapter is None else of_adapter.setdefault(adapter, {}))[saved] = name
        return cls(of_adapter, of_base, not is_saved_adapter and any(_BASE.search(name) for name in names))


def _taken_apart(name: str) -> tuple[str | None, str]:
    """Return the adapter of a name, "" where the name does not state it, and the name in a saved adapter."""
    tuned, module = _TUNED.fullmatch(name), _SAVED_MODULE.fullmatch(name)
    if module is not None:
        return module["adapter"], module["head"] + module["tail"]
    if tuned is None:
        return None, _BASE.sub("", name)
    tail = "" if tuned["head"].endswith(_DORA) else tuned["tail"] or ""
    return tuned["adapter"] or "", tuned["head"] + tail


# Fields of adapter_config.json by which equal tensors make other models: how an adapter is scaled, what it is added to.
_OPTIONS = (
    _KIND, "r", "lora_alpha", "alpha", "use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
    "layer_replication",
)  # fmt: skip


def differing_options(actual: Checkpoint, expected: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """Return the options of two saved adapters that change what they compute, by name, where they differ."""
    if not (_KIND in actual.config and _KIND in expected.config):
        return {}
    stated = [name for name in _OPTIONS if name in actual.config and name in expected.config]  # versions differ in them
    pairs = {name: (actual.config[name], expected.config[name]) for name in stated}
    return {name: pair for name, pair in pairs.items() if _without_empty(pair[0]) != _without_empty(pair[1])}


def _without_empty(option: Any) -> Any:
    """Return an option, None where it is an empty pattern."""
    return None if option in ({}, []) else option


@dataclass(frozen=True, slots=True)
class AdapterReading:
    """Both sides as they can be compared.

    Attributes:
        actual, expected: The sides.
        words: How the side that holds more is read.
        left_out: What is not compared of it, and why.
    """

    actual: Checkpoint
    expected: Checkpoint
    words: str
    left_out: Mapping[str, str]


def adapter_readings(actual: Checkpoint, expected: Checkpoint) -> Iterator[AdapterReading]:
    """Yield readings of a model that holds its adapters, where the other side is an adapter or a merged model."""
    sides = {"actual": actual, "the reference": expected}
    names = {
        side: AdapterNames.of(checkpoint.names(), is_saved_adapter=_KIND in checkpoint.config)
        for side, checkpoint in sides.items()
    }
    for side, other in (("actual", "the reference"), ("the reference", "actual")):
        if not names[side].holds_base or not names[side].of_adapter or names[other].holds_base:
            continue
        if names[other].of_adapter:
            readings = _as_adapter(side, sides[side], names[side], other, sides[other], names[other])
        else:
            readings = _as_merged(side, sides[side], sides[other])
        for here, there, words, left_out in readings:
            pair = (here, there) if side == "actual" else (there, here)
            yield AdapterReading(*pair, words, left_out)


_Reading = tuple[Checkpoint, Checkpoint, str, Mapping[str, str]]


def _as_adapter(
    side: str, checkpoint: Checkpoint, names: AdapterNames, other: str, saved: Checkpoint, saved_names: AdapterNames
) -> Iterator[_Reading]:
    """Yield each adapter as `save_pretrained` writes it, the one that is most like the saved one first."""
    if len(saved_names.of_adapter) > 1:
        return
    expected_names = {**saved_names.of_base, **next(iter(saved_names.of_adapter.values()))}
    beside = {saved: name for saved, name in names.of_base.items() if saved in expected_names}  # such as embeddings
    views = {
        adapter: under_names(checkpoint, {**beside, **of_adapter}) for adapter, of_adapter in names.of_adapter.items()
    }
    there = under_names(saved, expected_names)
    for adapter in sorted(views, key=lambda adapter: _num_differing(views[adapter], there)):
        left_out = {f"base model of {side}": f"{other} holds the adapter alone"}
        left_out |= {f"adapter {one!r} of {side}": f"{other} holds one adapter" for one in views if one != adapter}
        yield views[adapter], there, f"adapter {adapter!r} of {side} is read as PEFT saves it", left_out


def _num_differing(view: Checkpoint, other: Checkpoint) -> int:
    """Return how many tensors of the same name are not the same."""
    with BitComparer() as comparer:
        return sum(not _is_same(view, other, name, comparer) for name in {*view.names()} & {*other.names()})


def _as_merged(side: str, checkpoint: Checkpoint, saved: Checkpoint) -> Iterator[_Reading]:
    """Yield the model with its adapters merged, if more of its adapted weights equal the other side's so."""
    merged = checkpoint.merged() if isinstance(checkpoint, MergesAdapters) else None
    if merged is None:
        return
    base = AdapterNames.of(checkpoint.names()).of_base
    adapted = [name for name, old in base.items() if old != name]
    tails = {name: other_name for other_name in saved.names() for name in adapted if _is_tail(other_name, name)}
    there = under_names(saved, tails)
    with BitComparer() as comparer:
        plain, new = (
            sum(_is_same(side_, there, name, comparer) for name in {*tails} & {*side_.names()})
            for side_ in (under_names(checkpoint, base), merged)
        )
    if new > plain or (new == plain and new == len(tails)):
        yield merged, saved, f"{side} is read with its adapters merged", {}


def _is_tail(name: str, whole: str) -> bool:
    return whole == name or whole.endswith(f".{name}")


def _is_same(view: Checkpoint, other: Checkpoint, name: str, comparer: BitComparer) -> bool:
    here, there = CheckpointTensor(view, name), CheckpointTensor(other, name)
    return here.shape == there.shape and here.dtype == there.dtype and comparer.equal(here, there)
