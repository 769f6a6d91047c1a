"""Whether the module's own weights are what its float32 masters round to, as they are after each step of DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tpcheck.checkpoints.deepspeed_training.merged import same_bits
from tpcheck.checkpoints.deepspeed_training.states import RankState
from tpcheck.checkpoints.files import Files

_ELEMENTS = 1024
"""Of each parameter, from its start: what went stale did so everywhere, and all of it would be a second checkpoint."""


def rounding_note(states: Sequence[RankState], files: Files) -> str:
    """Return a remark on parameters whose first elements are not the rounding of their masters, or nothing."""
    stale = list(dict.fromkeys(name for state in states for name in _stale(state, files)))
    if not stale:
        return ""
    names = ", ".join(stale[:3]) + (f" and {len(stale) - 3} more" if len(stale) > 3 else "")
    return f"; the module holds no rounding of them for {names}"


def _stale(state: RankState, files: Files) -> Iterator[str]:
    for name, rounded in state.rounded.items():
        master = state.shards[name]
        count = min(_ELEMENTS, master.numel)
        if master.shape != rounded.shape:
            yield name
        elif master.dtype.is_floating_point and rounded.dtype.is_floating_point:
            expected = master.read(files, 0, count).to(rounded.dtype)
            if not same_bits(rounded.read(files, 0, count), expected):
                yield name
