"""Lines that state a measured ratio beside what is wanted of it; `ci/bench/all` gathers them."""

from __future__ import annotations

MET, MISSED = "met   ", "missed"


def goal(
    what: str, value: float, *, at_most: float | None = None, at_least: float | None = None, unit: str = "times"
) -> None:
    """Print the value beside its limit."""
    is_met = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    wanted = f"at most {at_most:g}" if at_most is not None else f"at least {at_least:g}"
    print(f"  {MET if is_met else MISSED}  {what}: {value:.3g} {unit} (wanted: {wanted})", flush=True)


def is_goal(line: str) -> bool:
    """Return whether `goal` has printed the line."""
    return line.strip().startswith((MET.strip() + " ", MISSED + " ")) and "(wanted: " in line
