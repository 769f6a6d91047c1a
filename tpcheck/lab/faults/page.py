"""The table of faults as one HTML page that needs nothing else, with a picture of the margins."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, inf, isfinite, log10

from tpcheck.lab.faults.report import margin, outcome, summary, true_causes
from tpcheck.lab.faults.results import Caught, Score, by_kind
from tpcheck.report import words
from tpcheck.report.pages import page

WIDTH, LEFT, RIGHT = 920, 24, 130
PANEL, TOP, AXIS = 190, 44, 26  # pixels: of a panel, of what is above its marks, of what is below
_PITCH = 6.5  # pixels from mark to mark
_DECADE_LABELS = 3

# Blue and vermilion of Okabe and Ito's palette: told apart with every kind of colour vision; shapes differ, too.
STYLE = """
.m-clean{fill:#0072b2}.m-fault{fill:#d55e00}.m-unseen{fill:none;stroke:#d55e00}
.m-ink{fill:#1f2328}.m-dim{fill:#59636e}.m-line{stroke:#8c959f}.m-grid{stroke:#d1d9e0}.m-gap{fill:#8c959f;opacity:.13}
.m-text{font:12px system-ui,sans-serif}.m-head{font:600 13px system-ui,sans-serif}
@media (prefers-color-scheme:dark){.m-clean{fill:#56b4e9}.m-fault{fill:#f0894b}.m-unseen{stroke:#f0894b}
.m-ink{fill:#f0f6fc}.m-dim{fill:#9198a1}.m-line{stroke:#6e7681}.m-grid{stroke:#3d444d}.m-gap{fill:#9198a1;opacity:.16}}
"""


@dataclass(frozen=True, slots=True)
class Panel:
    """One row of the picture.

    Attributes:
        title: Above it.
        score: What is drawn.
    """

    title: str
    score: Score


@dataclass(frozen=True, slots=True)
class _Scale:
    first: int  # decades
    last: int

    def x(self, margin: float) -> float:
        """Return the place of a finite margin."""
        decade = min(max(log10(margin) if margin > 0 else self.first, self.first), self.last)
        return LEFT + (decade - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)


def margins_svg(panels: Sequence[Panel]) -> str:
    """Return one SVG element for all panels, with the same scale; its style follows light and dark."""
    scale = _scale([row.margin for panel in panels for row in _rows(panel.score)])
    height = PANEL * len(panels) + AXIS
    body = "".join(
        f'<g transform="translate(0 {number * PANEL})">{"".join(_panel(panel, scale))}</g>'
        for number, panel in enumerate(panels)
    )
    caption = (
        f'<text class="m-text m-dim" x="{LEFT}" y="{height - 8}">'
        "margin: observed error / allowed error, log scale; below 1 passes</text>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Margins of clean runs and of faults"><style>{STYLE}</style>{body}{caption}</svg>\n'
    )


def _rows(score: Score) -> tuple[Caught, ...]:
    return (*_clean(score), *score.faults, *score.hidden)


def _clean(score: Score) -> tuple[Caught, ...]:
    """Clean runs of calibrated checks; exact ones have a margin of 0 and no place on a log scale."""
    return tuple(row for row in score.controls if row.margin > 0)


def _scale(margins: Sequence[float]) -> _Scale:
    decades = [log10(margin) for margin in margins if isfinite(margin) and margin > 0]
    return _Scale(min([-2, *(floor(decade) for decade in decades)]), max([4, *(ceil(decade) for decade in decades)]))


def _panel(panel: Panel, scale: _Scale) -> Iterator[str]:
    score, base = panel.score, PANEL - AXIS
    yield f'<text class="m-head m-ink" x="{LEFT}" y="16">{escape(panel.title)}</text>'
    yield from _axis(scale, base)
    yield from _gap(score, scale, base)
    clean = _clean(score)
    yield from _marks([(row.margin, row, "m-clean") for row in clean], scale, base)
    faults = [(row.margin, row, "m-fault" if row.caught else "m-unseen") for row in (*score.faults, *score.hidden)]
    yield from _marks([fault for fault in faults if isfinite(fault[0])], scale, base)
    yield from _exact([fault for fault in faults if not isfinite(fault[0])], base)


def _axis(scale: _Scale, base: float) -> Iterator[str]:
    yield f'<line class="m-line" x1="{LEFT}" x2="{WIDTH - 12}" y1="{base}" y2="{base}"/>'
    for decade in range(scale.first, scale.last + 1):
        x = scale.x(10.0**decade)
        if decade == 0:
            yield f'<line class="m-line" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{base}" stroke-dasharray="4 3"/>'
            yield f'<text class="m-text m-dim" x="{x + 4:.1f}" y="{TOP}">allowed</text>'
        if decade % _DECADE_LABELS == 0:
            yield f'<line class="m-line" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>'
            label = "1" if decade == 0 else f"1e{decade:+d}"
            yield f'<text class="m-text m-dim" x="{x:.1f}" y="{base + 17}" text-anchor="middle">{label}</text>'
    x = WIDTH - RIGHT / 2 + 12
    yield f'<text class="m-text m-dim" x="{x:.1f}" y="{base + 17}" text-anchor="middle">exact checks</text>'


def _gap(score: Score, scale: _Scale, base: float) -> Iterator[str]:
    """The empty space between the worst clean run and the least fault that must show."""
    worst, least = score.worst, score.least
    if worst is None or least is None or not 0 < worst.margin < least.margin < inf:
        return
    start, stop = scale.x(worst.margin) + _PITCH / 2, scale.x(least.margin) - _PITCH / 2
    size = f'width="{max(0.0, stop - start):.1f}" height="{base - TOP + 8}"'
    yield f'<rect class="m-gap" x="{start:.1f}" y="{TOP - 8}" {size}/>'
    middle = (start + stop) / 2
    decades = log10(least.margin / worst.margin)
    for line, text in enumerate(
        (
            f"worst clean run {words.margin(worst.margin)}",
            f"least fault caught {words.margin(least.margin)}",
            f"{decades:.0f} orders of magnitude apart",
        )
    ):
        y = TOP + 30 + 17 * line
        yield f'<text class="m-text m-ink" x="{middle:.1f}" y="{y}" text-anchor="middle">{text}</text>'


def _marks(rows: Sequence[tuple[float, Caught, str]], scale: _Scale, base: float) -> Iterator[str]:
    """A mark for each row, stacked where margins are alike; stacks that would be too high are drawn closer."""
    stacks: defaultdict[int, list[tuple[Caught, str]]] = defaultdict(list)
    for error, row, style in sorted(rows, key=lambda entry: entry[0]):
        stacks[round(scale.x(error) / _PITCH)].append((row, style))
    highest = max((len(stack) for stack in stacks.values()), default=0)
    pitch = min(_PITCH, (base - TOP - 4) / max(highest, 1))
    for place, stack in stacks.items():
        if pitch < 1:  # a bar: more marks than there are pixels
            height = len(stack) * pitch
            x, style = place * _PITCH - _PITCH / 2 + 0.5, stack[0][1]
            title = escape(f"{len(stack)} runs")
            yield (
                f'<rect class="{style}" x="{x:.1f}" y="{base - max(height, 1):.1f}" width="{_PITCH - 1}" '
                f'height="{max(height, 1):.1f}"><title>{title}</title></rect>'
            )
            continue
        for number, (row, style) in enumerate(stack):
            yield _mark(place * _PITCH, base - 4 - number * pitch, row, style)


def _exact(rows: Sequence[tuple[float, Caught, str]], base: float) -> Iterator[str]:
    """What exact checks found: infinitely more than they allow, in a block beside the scale."""
    columns = max(8, ceil(len(rows) / ((base - TOP) // _PITCH)))
    pitch = min(_PITCH, (RIGHT - 36) / columns)
    for number, (_, row, style) in enumerate(rows):
        line, column = divmod(number, columns)
        yield _mark(WIDTH - RIGHT / 2 + 12 + (column - (columns - 1) / 2) * pitch, base - 4 - line * _PITCH, row, style)


def _mark(x: float, y: float, row: Caught, style: str) -> str:
    title = f"<title>{escape(f'{row.fault}: {words.margin(row.margin)}')}</title>"
    if row.is_control:
        return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="2.8">{title}</circle>'
    return f'<path class="{style}" d="M{x:.1f} {y - 3.2:.1f}l3.2 6h-6.4z">{title}</path>'


_PLACES_SHOWN = 2


def faults_html(score: Score, environment: Mapping[str, str], seconds: float) -> str:
    """Return the page: what it comes to, the picture of margins, every fault, every clean run."""
    from markupsafe import Markup

    title = ", ".join(sorted({row.dtype for row in score.faults} - {"any"}))
    return page(
        "faults.html",
        score=score,
        summary=summary(score),
        kinds=by_kind([*score.faults, *score.hidden]),
        picture=Markup(margins_svg([Panel(title, score)])),  # its names are escaped
        versions=", ".join(f"{name} {version}" for name, version in sorted(environment.items())),
        seconds=seconds,
        outcome=outcome,
        margin=margin,
        is_right=lambda row: row.caught and row.place_is_right and row.cause_is_right,
        places=_places,
        causes=true_causes,
        link=lambda row: row.link if row.link and row.link.startswith("https://") else None,
    )


def _places(row: Caught) -> str:
    return words.few(row.true_places, _PLACES_SHOWN) or "elsewhere"
