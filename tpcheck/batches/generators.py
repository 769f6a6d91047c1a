"""In which state each random generator of this process is, as digests that ranks can compare."""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
import xxhash

_WORDS = 625  # of a Mersenne Twister: NumPy's mt19937.h has key[624] and pos, CPython's _randommodule.c the index first
_Words = ctypes.c_char * (4 * _WORDS)


def of_global_python() -> bytes:
    """Return the words of the generator behind `random.random`, and the normal number that it holds in reserve."""
    own = getattr(random.getstate, "__self__", None)
    words = _words_of_python(own) if type(own) is random.Random else None
    if words is None:
        return of_python(random.getstate())
    held: bytes = words.raw
    gauss = own.gauss_next  # type: ignore[union-attr]
    return held if gauss is None else held + repr(gauss).encode()


def of_python(state: Any) -> bytes:
    """Return the same for what `getstate` returns."""
    _, words, gauss = state
    return struct.pack(f"={_WORDS}I", words[-1], *words[:-1]) + (b"" if gauss is None else repr(gauss).encode())


def of_global_numpy(numpy_random: Any) -> bytes | None:
    """Return the words of the generator behind `numpy.random.random`, and the normal number that it holds in reserve.

    None where it is no Mersenne Twister.
    """
    generator = getattr(numpy_random, "get_bit_generator", lambda: None)()  # since NumPy 1.24
    words = None if generator is None else _words_of_numpy(generator)
    reserve = _reserve_of_numpy(numpy_random)
    if words is None or reserve is None:
        return of_numpy(numpy_random.get_state(legacy=False))
    held: bytes = words.raw
    has_gauss, gauss = reserve
    return held + bytes(gauss) if has_gauss.value else held


def of_numpy(state: Any) -> bytes | None:
    """Return the same for what `get_state(legacy=False)` returns."""
    if state["bit_generator"] != "MT19937":
        return None
    words: bytes = state["state"]["key"].tobytes() + struct.pack("=i", state["state"]["pos"])
    return words + struct.pack("=d", state["gauss"]) if state["has_gauss"] else words


@lru_cache(maxsize=1)
def _words_of_python(own: random.Random) -> Any:
    if sys.implementation.name != "cpython" or random.Random.__basicsize__ < object.__basicsize__ + 4 * _WORDS:
        return None
    words = _Words.from_address(id(own) + object.__basicsize__)
    return words if words.raw == of_python((None, own.getstate()[1], None)) else None


@lru_cache(maxsize=1)
def _words_of_numpy(generator: Any) -> Any:
    if type(generator).__name__ != "MT19937":
        return None
    words = _Words.from_address(generator.ctypes.state_address)
    state = generator.state["state"]
    return words if words.raw == state["key"].tobytes() + struct.pack("=i", state["pos"]) else None


@lru_cache(maxsize=1)
def _reserve_of_numpy(numpy_random: Any) -> tuple[Any, Any] | None:
    """Return where the flag and the number of its reserve lie; None where that cannot be told."""
    own = getattr(getattr(numpy_random, "mtrand", None), "_rand", None)
    place = _place_of_reserve(numpy_random.RandomState)
    if sys.implementation.name != "cpython" or type(own) is not numpy_random.RandomState or place is None:
        return None
    return ctypes.c_int.from_address(id(own) + place - 8), ctypes.c_double.from_address(id(own) + place)


def _place_of_reserve(kind: Callable[[int], Any]) -> int | None:
    """Return the offset of `gauss` in a RandomState (numpy/random/mtrand.pyx: int has_gauss; double gauss).

    It is looked for in one whose reserve is known.
    """
    probe = kind(0)
    probe.standard_normal()
    held = struct.pack("=d", probe.get_state(legacy=False)["gauss"])
    memory = ctypes.string_at(id(probe), type(probe).__basicsize__)
    places = [place for place in range(8, len(memory) - 7, 8) if memory[place : place + 8] == held]
    flags = [ctypes.c_int.from_address(id(probe) + place - 8) for place in places]
    before = [flag.value for flag in flags]
    probe.standard_normal()  # takes it out of the reserve
    return places[0] if before == [1] and flags[0].value == 0 else None


_MOST_ATTRIBUTES = 64  # of one object; a dataset that keeps its samples in its attributes is not searched through


class States(Mapping[str, str]):
    """Digests of generators' states, by name; the states are kept as they are until a digest is asked for."""

    __slots__ = ("_raw",)

    def __init__(self, raw: Mapping[str, Any] | None = None) -> None:
        self._raw = dict(raw or {})  # a digest, the words of a Mersenne Twister, or a tensor

    def __getitem__(self, name: str) -> str:
        raw = self._raw[name]
        return raw if isinstance(raw, str) else xxhash.xxh3_64_hexdigest(_bits(raw))

    def __contains__(self, name: object) -> bool:  # Mapping's would make the digest
        return name in self._raw

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)

    def __or__(self, other: Mapping[str, str]) -> States:
        return States(self._raw | (other._raw if isinstance(other, States) else dict(other)))

    def bits(self, name: str) -> bytes | None:
        """Return a state itself, None where only its digest is kept."""
        raw = self._raw.get(name)
        return None if raw is None or isinstance(raw, str) else _bits(raw)


def rng_digests(**owners: Any) -> dict[str, str]:
    """Return a digest of each generator's state, by name, as `rng_states` does.

    Example:
        >>> before = rng_digests()
        >>> drawn = random.random()
        >>> sorted(moved(before, rng_digests()))
        ['python']
    """
    return dict(rng_states(**owners))


def rng_states(**owners: Any) -> States:
    """Return each generator's state, by name: `python`, `numpy`, `torch`, and `cuda` where it is in use.

    Takes about 3 microseconds (40 with caches cold) and changes no state. NumPy is looked at only where it is imported.

    Args:
        owners: Objects that may hold generators of their own, such as a dataset. One found in `dataset.transform.rng`
            is named `numpy:dataset.transform.rng`.
    """
    raw: dict[str, Any] = {"python": of_global_python(), "torch": torch.default_generator.get_state()}
    if "numpy.random" in sys.modules:
        raw["numpy"] = _of_global_numpy(sys.modules["numpy.random"])
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with suppress(RuntimeError):  # while a CUDA graph is captured, nobody may ask
            raw["cuda"] = torch.cuda.get_rng_state()
    return with_own(States(raw), **owners)


def with_own(states: States, **owners: Any) -> States:
    """Return these states, taken at this moment, with those of the generators that the owners hold."""
    own: dict[str, str] = {}
    for path, generator in _own_generators(owners):
        kind, digest = _of_generator(generator)
        own[f"{kind}:{path}"] = digest
    return states | own if own else states


def moved(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the generators that were drawn from (or seeded) in between."""
    return tuple(name for name in after if name in before and not _same(before, after, name))


def _same(before: Mapping[str, str], after: Mapping[str, str], name: str) -> bool:
    if isinstance(before, States) and isinstance(after, States):
        one, other = before.bits(name), after.bits(name)
        if one is not None and other is not None:
            return one == other
    return before[name] == after[name]


def _bits(raw: bytes | torch.Tensor) -> bytes:
    return raw if isinstance(raw, bytes) else raw.numpy().tobytes()


def _of_global_numpy(numpy_random: Any) -> bytes | str:
    words = of_global_numpy(numpy_random)
    return _of_numpy(numpy_random.get_state(legacy=False)) if words is None else words


def _of_numpy(state: Any) -> str:
    """Return a digest of a bit generator's state: nested dicts of integers, names and arrays."""
    digest = xxhash.xxh3_64()
    _feed(digest, state)
    return digest.hexdigest()


def _feed(digest: Any, state: Any) -> None:
    if isinstance(state, Mapping):
        for key, value in state.items():
            digest.update(key.encode())
            _feed(digest, value)
    else:
        digest.update(state.tobytes() if hasattr(state, "tobytes") else repr(state).encode())


def _of_tensor(state: torch.Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(state.numpy().data)


def _of_generator(generator: Any) -> tuple[str, str]:
    if isinstance(generator, torch.Generator):
        return ("cuda" if generator.device.type == "cuda" else "torch"), _of_tensor(generator.get_state())
    if isinstance(generator, random.Random):
        return "python", xxhash.xxh3_64_hexdigest(of_python(generator.getstate()))
    if hasattr(generator, "bit_generator"):
        return "numpy", _of_numpy(generator.bit_generator.state)
    return "numpy", _of_numpy(generator.get_state(legacy=False))


def _own_generators(owners: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the generators in the attributes of these objects, and of the objects in those attributes."""
    numpy_random = sys.modules.get("numpy.random")
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if numpy_random is not None:
        kinds = (*kinds, numpy_random.Generator, numpy_random.RandomState)
    for name, owner in owners.items():
        for path, value in _attributes(name, owner):
            if isinstance(value, kinds):
                yield path, value
            else:
                yield from ((inner, held) for inner, held in _attributes(path, value) if isinstance(held, kinds))


def _attributes(path: str, owner: Any) -> Iterator[tuple[str, Any]]:
    attributes = getattr(owner, "__dict__", None)
    if isinstance(attributes, dict) and len(attributes) <= _MOST_ATTRIBUTES:
        yield from ((f"{path}.{name}", value) for name, value in attributes.items())
