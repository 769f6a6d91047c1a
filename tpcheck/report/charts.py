"""Charts as inline SVG: errors on a logarithmic scale above the band that is allowed, and tiles as a heat map.

Colours and sizes of text are the page's, by class. Every mark has a title, and every chart a text that replaces it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import ceil, floor, isfinite, log10

WIDTH, HEIGHT = 560, 240  # of a chart, in the units of its text
LEFT, RIGHT, TOP, BOTTOM = 62, 10, 28, 26
LANE = 18  # for zeros below the scale, and for infinities above it
MOST_DECADES = 24
TILE = 14  # edge of a tile
MAP_WIDTH = 16 * TILE
SHADES = 8  # half decades below the largest tile, one class of colour each
_LONGEST_NAME = 120
_TEXT = 17.0  # units of text on a narrow screen, for which ticks leave room
# Line breaks and control characters, which a title would show as blanks or boxes, and halves of surrogate pairs.
_NOT_SHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a chart.

    Attributes:
        x: Place along the axis, from 0.
        value: What is drawn; 0, infinities and NaN have their own lanes.
        title: What hovering shows.
        look: Class of the mark, which decides its shape: `within`, `wrong`, `unmeasured`, or `series-0` to `series-5`.
        allowed: Upper edge of the band at this place; None for none.
    """

    x: float
    value: float
    title: str
    look: str
    allowed: float | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """A label below the horizontal axis; those that are not main are left out before others."""

    x: float
    label: str
    is_main: bool = True


@dataclass(frozen=True, slots=True)
class LogScale:
    """A logarithmic axis of whole decades.

    Attributes:
        low, high: Exponents of its ends.
        has_zeros: Whether a lane for zeros lies below it.
        has_infinities: Whether a lane for what is not finite lies above it.
    """

    low: int
    high: int
    has_zeros: bool
    has_infinities: bool

    @classmethod
    def of(cls, values: Iterable[float], edges: Iterable[float] = ()) -> LogScale:
        """Return the scale for these values, wide enough for the edges of bands."""
        listed = list(values)
        positive = [value for value in (*listed, *edges) if value > 0 and isfinite(value)]
        high = ceil(log10(max(positive, default=1.0)) + 0.05)
        low = max(floor(log10(min(positive, default=0.1)) - 0.05), high - MOST_DECADES)
        has_zeros = any(0 <= value <= 10.0**low for value in listed)
        return cls(low, max(high, low + 1), has_zeros, not all(map(isfinite, listed)))

    @property
    def top(self) -> float:
        return TOP + (LANE if self.has_infinities else 0)

    @property
    def bottom(self) -> float:
        return HEIGHT - BOTTOM - (LANE if self.has_zeros else 0)

    def y(self, value: float) -> float:
        if not isfinite(value):
            return TOP + LANE / 4
        return self.y_of_power(log10(value) if value > 0 else float(self.low - 1))

    def y_of_power(self, exponent: float) -> float:
        """Return the place of a power of ten, which itself may be too large for a float."""
        if exponent < self.low:
            return HEIGHT - BOTTOM - LANE / 4
        return self.bottom - (min(exponent, self.high) - self.low) / (self.high - self.low) * (self.bottom - self.top)

    def ticks(self) -> Iterator[int]:
        step = ceil((self.high - self.low) / 6)
        return (exponent for exponent in range(self.low, self.high + 1) if (self.high - exponent) % step == 0)


def shortened(name: str, longest: int = _LONGEST_NAME) -> str:
    """Return a name that fits, without its middle where it is too long, and without characters that cannot be shown."""
    text = _NOT_SHOWN.sub("?", name)
    return text if len(text) <= longest else f"{text[: longest // 2 - 1]}…{text[-(longest // 2) :]}"


def scatter(
    marks: Sequence[Mark],
    scale: LogScale,
    *,
    length: float,
    ticks: Sequence[Tick],
    text: str,
    pointed: tuple[int, str] | None = None,
    line_at: float | None = None,
) -> str:
    """Return a chart of marks.

    Args:
        marks: In the order of the axis.
        scale: Of the vertical axis.
        length: Of the horizontal axis: one more than the last place.
        ticks: In order; labels that would overlap are left out.
        text: What the chart shows, for those who cannot see it.
        pointed: Index of the mark to point out, and its name.
        line_at: A value to draw a line at.
    """
    unit = (WIDTH - LEFT - RIGHT) / max(length, 1)

    def x(place: float) -> float:
        return LEFT + (place + 0.5) * unit

    parts = [*_vertical_axis(scale), *_horizontal_axis([(x(tick.x), tick) for tick in ticks])]
    parts += _bands(marks, scale, unit)
    if line_at is not None:
        parts.append(f'<path class="limit" d="M{LEFT} {scale.y(line_at):.1f}H{WIDTH - RIGHT}"/>')
    if pointed is not None:
        mark = marks[pointed[0]]
        parts += _pointer(x(mark.x), scale.y(mark.value), HEIGHT - BOTTOM, shortened(pointed[1], 36))
    # Marks that are wrong are drawn last, above the others.
    for mark in sorted(marks, key=lambda mark: mark.look == "wrong"):
        parts.append(_shape(x(mark.x), scale.y(mark.value), mark.look, mark.title))
    return _svg("chart", WIDTH, HEIGHT, text, parts)


def _svg(look: str, width: float, height: float, text: str, parts: Iterable[str]) -> str:
    box = f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(text)}"'
    return f'<svg class="{look}" {box}>{"".join(parts)}</svg>'


def _vertical_axis(scale: LogScale) -> Iterator[str]:
    labels = [(scale.y_of_power(exponent), f"1e{exponent}" if exponent else "1") for exponent in scale.ticks()]
    labels += [(scale.y(0.0), "0")] if scale.has_zeros else []
    labels += [(scale.y(float("inf")), "inf, nan")] if scale.has_infinities else []
    for y, label in labels:
        yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'


def _horizontal_axis(ticks: Sequence[tuple[float, Tick]]) -> Iterator[str]:
    """Yield ticks, and the labels that have room: at even distances those that count, then others between them."""
    placed: list[tuple[float, float]] = []
    main = [(x, tick.label) for x, tick in ticks if tick.is_main]
    room = max((len(label) for _, label in main), default=1) * _TEXT * 0.58 + 12
    every = max(1, ceil(room * len(main) / (WIDTH - LEFT - RIGHT)))
    for x, label in [*main[::every], *((x, tick.label) for x, tick in ticks if not tick.is_main)]:
        shown = shortened(label, 18)
        width = len(shown) * _TEXT * 0.58
        start = min(x - 4, WIDTH - width)
        if all(start >= end or start + width <= other for other, end in placed):
            placed.append((start - 8, start + width + 8))
            yield f'<path class="grid" d="M{x:.1f} {HEIGHT - BOTTOM}v5"/>'
            yield f'<text x="{start:.1f}" y="{HEIGHT - 7}">{escape(shown)}</text>'


def _bands(marks: Sequence[Mark], scale: LogScale, unit: float) -> Iterator[str]:
    """Yield what is allowed, as one shape for each run of adjacent marks that have an allowance."""
    floor_y = HEIGHT - BOTTOM
    for has_allowance, run in groupby(marks, key=lambda mark: mark.allowed is not None):
        if not has_allowance:
            continue
        listed = list(run)
        path = f"M{LEFT + listed[0].x * unit:.1f} {floor_y}"
        for index, mark in enumerate(listed):
            end = listed[index + 1].x if index + 1 < len(listed) else mark.x + 1
            path += f"V{scale.y(mark.allowed or 0.0):.1f}H{LEFT + end * unit:.1f}"
        yield f'<path class="band" d="{path}V{floor_y}z"/>'


def _pointer(x: float, y: float, bottom: float, label: str) -> Iterator[str]:
    """Yield a line, a ring, and the name of the first wrong place, on the side that has room."""
    is_left = x > (LEFT + WIDTH) / 2
    yield f'<path class="pointer" d="M{x:.1f} {TOP - 12}V{bottom}"/>'
    yield f'<circle class="pointer" cx="{x:.1f}" cy="{y:.1f}" r="8"/>'
    side = f'x="{x - 6:.1f}" text-anchor="end"' if is_left else f'x="{x + 6:.1f}"'
    yield f'<text class="pointed" {side} y="{TOP - 15}">{escape(label)}</text>'


_PATHS = {
    "wrong": "m0-5l5 5-5 5-5-5z",
    "unmeasured": "m-2.5-2.5h5v5h-5z",
    "series-1": "m-3-3h6v6h-6z",
    "series-2": "m0-4l4 7h-8z",
    "series-3": "m0-4.5l4.5 4.5-4.5 4.5-4.5-4.5z",
    "series-4": "m0 4l4-7h-8z",
    "series-5": "m-4-1h3v-3h2v3h3v2h-3v3h-2v-3h-3z",
}
"""The shape of each look, from its middle; others are dots."""


def _shape(x: float, y: float, look: str, title: str) -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    if look in _PATHS:
        return f'<path class="{look}" d="M{x:.1f} {y:.1f}{_PATHS[look]}">{inside}</path>'
    return f'<circle class="{look}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">{inside}</circle>'


def legend_keys() -> dict[str, str]:
    """Return what stands beside the words of legends: marks by look, `band`, `pointer`, and `ramp` for heat maps."""
    parts = {look: _shape(7, 6, look, "") for look in ("within", "series-0", *_PATHS)}
    parts["band"] = '<rect class="band" width="14" height="12"/>'
    parts["pointer"] = '<circle class="pointer" cx="7" cy="6" r="5"/>'
    keys = {look: f'<svg viewBox="0 0 14 12" aria-hidden="true">{part}</svg>' for look, part in parts.items()}
    tiles = (
        f'<rect class="tile shade-{number}" x="{14 * (number - 1)}" width="14" height="12"/>'
        for number in range(1, SHADES + 1)
    )
    keys["ramp"] = f'<svg class="ramp" viewBox="0 0 112 12" aria-hidden="true">{"".join(tiles)}</svg>'
    return keys


@dataclass(frozen=True, slots=True)
class Outline:
    """A part of a heat map that is drawn with a border and a label: rows and columns, both ends included.

    Fractions are parts of tiles.
    """

    first_row: float
    last_row: float
    first_column: float
    last_column: float
    label: str


def heat_map(
    values: Sequence[Sequence[float]],
    titles: Sequence[Sequence[str]],
    outlines: Sequence[Outline],
    text: str,
    *,
    tile: tuple[float, float] = (TILE, TILE),
) -> str:
    """Return tiles whose shade is the value on a logarithmic scale below the largest, with outlines above them.

    Args:
        tile: Width and height of a tile.
    """
    wide, high = tile
    is_cut_along_rows = len({(line.first_row, line.last_row) for line in outlines}) > 1
    is_cut_along_columns = len({(line.first_column, line.last_column) for line in outlines}) > 1
    is_grid = is_cut_along_rows and is_cut_along_columns
    top, left = 20, 68 if is_cut_along_rows and not is_grid else 2
    largest = max((value for row in values for value in row if isfinite(value)), default=0.0)
    parts = [
        f'<rect class="tile shade-{shade(value, largest)}" x="{left + column * wide:g}" y="{top + row * high:g}" '
        f'width="{wide:g}" height="{high:g}"><title>{escape(titles[row][column])}</title></rect>'
        for row, listed in enumerate(values)
        for column, value in enumerate(listed)
    ]
    for line in outlines:
        x, y = left + line.first_column * wide, top + line.first_row * high
        width, height = (line.last_column - line.first_column + 1) * wide, (line.last_row - line.first_row + 1) * high
        parts.append(f'<rect class="shard" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>')
        middle, center = x + width / 2, y + height / 2 + 4
        at = f'x="{middle:g}" y="{top - 6}" text-anchor="middle"'
        if is_grid:
            at = f'class="inside" x="{middle:g}" y="{center:g}" text-anchor="middle"'
        elif is_cut_along_rows:
            at = f'x="{left - 6}" y="{center:g}" text-anchor="end"'
        parts.append(f"<text {at}>{escape(line.label)}</text>")
    # All maps have one width on the page, so that their tiles are of one size.
    return _svg("map", 68 + MAP_WIDTH + 4, top + len(values) * high + 4, text, parts)


def tile_spans(noun: str, size: int, number: int) -> list[tuple[int, str]]:
    """Return the tiles along an axis that hold something, each with the indices in it."""
    spans = []
    for tile in range(number):
        first, end = -(-tile * size // number), -(-(tile + 1) * size // number)
        if end > first:
            spans.append((tile, f"{noun} {first} to {end - 1}" if end - first > 1 else f"{noun[:-1]} {first}"))
    return spans or [(0, noun)]


def shade(value: float, largest: float) -> int:
    """Return the class of a tile's colour: 0 for nothing, `SHADES` for the largest values and what is not finite."""
    if not isfinite(value):
        return SHADES
    if value <= 0:
        return 0
    return max(0, SHADES - floor(2 * (log10(largest) - log10(value))))
