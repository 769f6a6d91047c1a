"""Lines that state a measured ratio beside what is wanted of it; `ci/bench/all` gathers them."""

from __future__ import annotations

import re

MET, MISSED = "met   ", "missed"


def goal(
    what: str, value: float, *, at_most: float | None = None, at_least: float | None = None, unit: str = "times"
) -> str:
    """Print the value beside its limit, and return the line."""
    is_met = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    wanted = f"at most {at_most:g}" if at_most is not None else f"at least {at_least:g}"
    line = f"  {MET if is_met else MISSED}  {what}: {value:.3g} {unit} (wanted: {wanted})"
    print(line, flush=True)
    return line


def as_row(line: str) -> str:
    """Return a line that `goal` has printed as a row of a table: what, measured, wanted, whether it is met."""
    match = re.fullmatch(r" *(\w+) +(.*): (\S+ \S+) \(wanted: (.*)\)", line.rstrip())
    assert match is not None
    is_met, what, measured, wanted = match.groups()
    return f"| {what} | {measured} | {wanted} | {'yes' if is_met == MET.strip() else '**no**'} |"


def is_goal(line: str) -> bool:
    """Return whether `goal` has printed the line."""
    return line.strip().startswith((MET.strip() + " ", MISSED + " ")) and "(wanted: " in line
