"""How many of a sampler's batches never reach the loop, told by who iterates it: a run that goes on skips some."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType

_LIBRARIES = ("torch", "torchdata", "accelerate")
_HIGHEST = 16  # frames; from a sampler to the loop there are 5 to 10


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The first batches of an epoch that nobody will see.

    Attributes:
        unmade: So many are skipped before the loader hears of them.
        unseen: So many after these are made and then dropped.
    """

    unmade: int = 0
    unseen: int = 0


def left_out() -> LeftOut | None:
    """Return what those do who ask for the iterator of a sampler, to be called in its `__iter__`.

    accelerate's `skip_first_batches` puts a SkipBatchSampler around a loader's own, or drops batches of the loader.
    None where somebody else deals with what the sampler gives: which batch that becomes cannot be told.
    """
    unmade = unseen = 0
    first = True
    for frame in _above(sys._getframe(2)):
        user = frame.f_locals.get("self")
        name = type(user).__name__
        if name == "DataLoaderDispatcher":  # several of the sampler's batches become one
            return None
        if first and name != "SkipBatchSampler" and not frame.f_globals["__name__"].endswith("dataloader"):
            return None
        first = False
        skipped = getattr(user, "skip_batches", 0)
        if name == "SkipBatchSampler":
            unmade += skipped
        elif isinstance(skipped, int):
            unseen += skipped
    return None if first else LeftOut(unmade, unseen)


def _above(frame: FrameType | None) -> list[FrameType]:
    """Return this frame and those that called it, as far as libraries go that make loaders."""
    frames: list[FrameType] = []
    while frame is not None and len(frames) < _HIGHEST:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
            break
        frames.append(frame)
        frame = frame.f_back
    return frames
