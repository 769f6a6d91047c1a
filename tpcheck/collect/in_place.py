"""The states of Python's and NumPy's global generators, read where they lie: asking takes 10 to 100 times longer.

Where they do not lie as expected they are asked for, and the bytes are the same.
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

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
