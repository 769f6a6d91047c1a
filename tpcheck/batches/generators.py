"""States of this process's random generators, kept so that draws can be seen and ranks can compare them."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
import xxhash

_MAX_ATTRIBUTES = 64  # of one object; a dataset that keeps its samples in its attributes is not searched


class GeneratorStates(Mapping[str, str]):
    """Digests of generators' states, by name. A digest is computed when it is read; draws are seen without it.

    Args:
        raw: A digest (a str), or the state as a value that `==` compares and whose `repr` is the same in every process.
    """

    __slots__ = ("_raw",)

    def __init__(self, raw: Mapping[str, Any] | None = None) -> None:
        self._raw = dict(raw or {})

    def __getitem__(self, name: str) -> str:
        raw = self._raw[name]
        if isinstance(raw, str):
            return raw
        return xxhash.xxh3_64_hexdigest(raw if isinstance(raw, bytes) else repr(raw).encode())

    def __contains__(self, name: object) -> bool:  # Mapping's would compute the digest
        return name in self._raw

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)

    def __or__(self, other: Mapping[str, str]) -> GeneratorStates:
        return GeneratorStates(self._raw | (other._raw if isinstance(other, GeneratorStates) else dict(other)))

    def raw(self, name: str) -> Any:
        """Return a generator's state, None where only its digest is kept."""
        raw = self._raw.get(name)
        return None if isinstance(raw, str) else raw


# Takes 43 us (NumPy 30, Python 12, torch 1), more with cold caches; three times a batch of a DataLoader, else twice. In
# one run on 2 busy cores, 2 ranks and 0.75 MiB, `watch` took 1.03 ms a batch, and 0.69 ms with states read from memory
# by ctypes (of a DataLoader 1.10 and 0.83): 1.0 % of a step of 100 ms for 0.7 %.
def rng_states(**owners: Any) -> GeneratorStates:
    """Return each generator's state, by name: `python`, `numpy`, `torch`, and `cuda` where it is in use.

    NumPy is read only where it has been imported. No state changes.

    Args:
        owners: Objects that may have generators of their own, such as a dataset. The generator
            `dataset.transform.rng` of NumPy is named `numpy:dataset.transform.rng`.

    Example:
        >>> before = rng_states()
        >>> drawn = random.random()
        >>> changed_generators(before, rng_states())
        ('python',)
    """
    raw: dict[str, Any] = {"python": random.getstate(), "torch": _bytes(torch.default_generator.get_state())}
    if "numpy.random" in sys.modules:
        raw["numpy"] = _comparable(sys.modules["numpy.random"].get_state(legacy=False))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with suppress(RuntimeError):  # not readable while a CUDA graph is captured
            raw["cuda"] = _bytes(torch.cuda.get_rng_state())
    return with_generators_of(GeneratorStates(raw), **owners)


def with_generators_of(states: GeneratorStates, **owners: Any) -> GeneratorStates:
    """Return `states`, read just now, and those of the generators in the owners' attributes."""
    owned = {f"{kind}:{path}": raw for path, kind, raw in _owned_states(owners)}
    return states | GeneratorStates(owned) if owned else states


def changed_generators(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the generators that were drawn from (or seeded) between the two states."""
    return tuple(name for name in after if name in before and not _same(before, after, name))


def _same(before: Mapping[str, str], after: Mapping[str, str], name: str) -> bool:
    if isinstance(before, GeneratorStates) and isinstance(after, GeneratorStates):
        raw_before, raw_after = before.raw(name), after.raw(name)
        if raw_before is not None and raw_after is not None:
            return bool(raw_before == raw_after)
    return before[name] == after[name]


def _bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _comparable(state: Any) -> Any:
    """Return a state of NumPy (nested dicts of integers, names and arrays) as tuples and bytes."""
    if isinstance(state, Mapping):
        return tuple((key, _comparable(value)) for key, value in state.items())
    return state.tobytes() if hasattr(state, "tobytes") else state


def _owned_states(owners: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield path, kind and state of the generators in these objects' attributes, and in the attributes of those."""
    for name, owner in owners.items():
        for path, value in _attributes(name, owner):
            if (state := _state(value)) is not None:
                yield (path, *state)
                continue
            for inner_path, inner in _attributes(path, value):
                if (state := _state(inner)) is not None:
                    yield (inner_path, *state)


def _state(value: Any) -> tuple[str, Any] | None:
    """Return kind and state of a generator, None for anything else."""
    numpy_random = sys.modules.get("numpy.random")
    if isinstance(value, torch.Generator):
        return ("cuda" if value.device.type == "cuda" else "torch"), _bytes(value.get_state())
    if isinstance(value, random.Random):
        return "python", value.getstate()
    if numpy_random is not None and isinstance(value, numpy_random.Generator):
        return "numpy", _comparable(value.bit_generator.state)
    if numpy_random is not None and isinstance(value, numpy_random.RandomState):
        return "numpy", _comparable(value.get_state(legacy=False))
    return None


def _attributes(path: str, owner: Any) -> Iterator[tuple[str, Any]]:
    attributes = getattr(owner, "__dict__", None)
    if isinstance(attributes, dict) and len(attributes) <= _MAX_ATTRIBUTES:
        yield from ((f"{path}.{name}", value) for name, value in attributes.items())
