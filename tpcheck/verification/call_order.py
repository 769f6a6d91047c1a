"""Numbers the calls of a shared module alike on all ranks.

A model may call one module several times in the order of a set of strings (gemma3's rotary embedding, once for each
type of layer). That order follows string hashing, which processes that were not forked from one another do not share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from tpcheck.collect.digest import digest
from tpcheck.records import Step, TensorKey

CallDigests = Mapping[str, tuple[str, ...]]  # module -> what each of its calls returned, in the order of the calls


def call_digests(step: Step) -> CallDigests:
    """Return the digests of the outputs of every call, for the modules that are called more than once.

    Args:
        step: A step of the reference, which is the same to the bit on every rank but for the order of calls.
    """
    found: dict[str, dict[int, str]] = defaultdict(lambda: defaultdict(str))
    for key, tensor in step.activations.items():
        if (key.phase, key.role) == ("forward", "output"):
            found[key.module][key.call] += digest(tensor)
    return {module: tuple(calls.values()) for module, calls in found.items() if len(calls) > 1}


def renumbered(step: Step, own: CallDigests, first: CallDigests) -> Step:
    """Return a rank's step with its calls numbered as on the first rank, where both made the same calls."""
    numbers = {module: _numbers(calls, first[module]) for module, calls in own.items() if _same(calls, first, module)}
    if all(mapping == list(range(len(mapping))) for mapping in numbers.values()):
        return step

    def moved(key: TensorKey) -> TensorKey:
        return replace(key, call=numbers[key.module][key.call]) if key.module in numbers else key

    return replace(step, activations={moved(key): tensor for key, tensor in step.activations.items()})


def _same(calls: tuple[str, ...], first: CallDigests, module: str) -> bool:
    return sorted(calls) == sorted(first.get(module, ()))


def _numbers(calls: tuple[str, ...], first: tuple[str, ...]) -> list[int]:
    """Return, for each call, its number on the first rank; equal calls keep their order."""
    places: dict[str, list[int]] = defaultdict(list)
    for number, outputs in enumerate(first):
        places[outputs].append(number)
    return [places[outputs].pop(0) for outputs in calls]
