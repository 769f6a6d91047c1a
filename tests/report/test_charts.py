"""Charts as SVG: scales, marks, ticks and tiles."""

from __future__ import annotations

import re
from itertools import pairwise
from math import inf, nan
from xml.etree import ElementTree as ET

import pytest

from tpcheck.report.charts import (
    SHADES,
    LogScale,
    Mark,
    Outline,
    Tick,
    heat_map,
    legend_keys,
    scatter,
    shade,
    shortened,
)

MARKS = (
    Mark(0, 1e-6, "a: error 1e-6", "within", 1e-5),
    Mark(1, 1e-3, 'b <script> " & : error 1e-3', "wrong", 1e-5),
    Mark(2, 1e-7, "c: error 1e-7", "unmeasured"),
)


def chart(marks: tuple[Mark, ...] = MARKS, **options: object) -> ET.Element:
    edges = [mark.allowed or 0.0 for mark in marks]
    scale = LogScale.of([mark.value for mark in marks], edges)
    given = {"length": len(marks), "ticks": (), "text": "what it shows", **options}
    return ET.fromstring(scatter(marks, scale, **given))  # type: ignore[arg-type]


def with_class(svg: ET.Element, look: str) -> list[ET.Element]:
    return [element for element in svg.iter() if element.get("class") == look]


def test_a_scale_has_whole_decades_around_all_values_and_edges() -> None:
    assert LogScale.of([2e-6, 3e-4], [5e-3]) == LogScale(-6, -2, has_zeros=False, has_infinities=False)
    assert LogScale.of([1.0]) == LogScale(-1, 1, has_zeros=False, has_infinities=False)


def test_values_without_a_logarithm_have_lanes_of_their_own() -> None:
    scale = LogScale.of([0.0, 1e-3, inf, nan])
    assert (scale.has_zeros, scale.has_infinities) == (True, True)
    assert scale.y(nan) == scale.y(inf) < scale.top <= scale.y(1e-3) <= scale.bottom < scale.y(0.0)


def test_a_scale_of_nothing_but_zeros_or_infinities_is_drawn() -> None:
    for value in (0.0, inf, nan):
        scale = LogScale.of([value])
        assert scale.high > scale.low
        assert scale.y(value) > 0


def test_a_scale_ends_far_below_the_largest_value() -> None:
    scale = LogScale.of([1e-300, 1.0])
    assert scale.low > -30
    assert scale.y(1e-300) > scale.bottom
    assert len(list(scale.ticks())) <= 8


def test_the_largest_and_the_smallest_numbers_are_drawn() -> None:
    marks = (Mark(0, 1.7e308, "", "within", 5e-324), Mark(1, 5e-324, "", "within", 1.7e308))
    assert with_class(chart(marks), "within")


def test_larger_values_are_drawn_higher() -> None:
    scale = LogScale.of([1e-6, 1e-2])
    heights = [scale.y(value) for value in (1e-6, 1e-5, 1e-4, 1e-2)]
    assert heights == sorted(heights, reverse=True)


def test_each_mark_has_a_title_and_the_look_it_is_given() -> None:
    svg = chart()
    for mark in MARKS:
        (shape,) = with_class(svg, mark.look)
        assert shape.findtext("title") == mark.title


def test_a_chart_says_in_words_what_it_shows() -> None:
    svg = chart(text='errors of "a" & <b>')
    assert (svg.get("role"), svg.get("aria-label")) == ("img", 'errors of "a" & <b>')


def test_the_band_is_drawn_where_an_error_is_allowed_and_nowhere_else() -> None:
    assert len(with_class(chart(), "band")) == 1
    separated = (MARKS[0], MARKS[2], MARKS[1])
    marks = tuple(Mark(place, mark.value, mark.title, mark.look, mark.allowed) for place, mark in enumerate(separated))
    assert len(with_class(chart(marks), "band")) == 2
    assert not with_class(chart((MARKS[2],)), "band")


def test_the_first_wrong_place_is_marked_and_named() -> None:
    svg = chart(pointed=(1, "model.<b>"))
    assert len(with_class(svg, "pointer")) == 2
    (label,) = with_class(svg, "pointed")
    assert label.text == "model.<b>"


@pytest.mark.parametrize("number", [1, 12, 200])
def test_labels_below_the_axis_do_not_overlap(number: int) -> None:
    marks = tuple(Mark(place, 1.0, "", "within") for place in range(number))
    ticks = [Tick(place, f"layers.{place}", is_main=place % 2 == 0) for place in range(number)]
    labels = [text for text in chart(marks, ticks=ticks).iter("text") if (text.text or "").startswith("layers")]
    spans = sorted((float(text.attrib["x"]), len(text.text or "") * 9.35) for text in labels)
    assert labels
    assert all(start + width <= after for (start, width), (after, _) in pairwise(spans))


def test_tiles_have_titles_and_the_darkest_shade_is_the_largest() -> None:
    svg = ET.fromstring(heat_map([[1.0, 0.0], [0.1, inf]], [["a", "b"], ["c", "<d>"]], [], "tiles"))
    looks = {tile.findtext("title"): tile.get("class") for tile in svg.iter("rect")}
    assert looks == {
        "a": f"tile shade-{SHADES}",
        "b": "tile shade-0",
        "c": "tile shade-6",
        "<d>": f"tile shade-{SHADES}",
    }


def test_shades_are_half_decades_below_the_largest() -> None:
    assert [shade(value, 1.0) for value in (1.0, 0.4, 0.3, 1e-3, 1e-9, 0.0)] == [8, 8, 7, 2, 0, 0]
    assert shade(5e-324, 1e308) == shade(0.0, 0.0) == 0
    assert shade(nan, 1.0) == SHADES


@pytest.mark.parametrize(
    ("outlines", "labels"),
    [
        ([Outline(0, 0, 0, 1, "rank 0"), Outline(1, 1, 0, 1, "rank 1")], ["rank 0", "rank 1"]),
        ([Outline(0, 1, 0, 0, "rank 0"), Outline(0, 1, 1, 1, "rank <1>")], ["rank 0", "rank <1>"]),
        ([Outline(row, row, column, column, f"{row}{column}") for row in (0, 1) for column in (0, 1)], None),
    ],
)
def test_shards_have_borders_and_labels(outlines: list[Outline], labels: list[str] | None) -> None:
    svg = ET.fromstring(heat_map([[1.0, 1.0], [1.0, 1.0]], [["", ""], ["", ""]], outlines, "tiles"))
    assert len(with_class(svg, "shard")) == len(outlines)
    assert [text.text for text in svg.iter("text")] == (labels or ["00", "01", "10", "11"])


def test_names_are_cut_in_the_middle_and_lose_what_cannot_be_shown() -> None:
    assert shortened("model.layers.0") == "model.layers.0"
    cut = shortened("a" * 500 + "z", 50)
    assert (len(cut), cut[0], cut[-1], "…" in cut) == (50, "a", "z", True)
    assert shortened("a\nb\x00\ud800") == "a?b??"


def test_legends_have_a_key_for_every_look() -> None:
    for look, key in legend_keys().items():
        assert ET.fromstring(key).get("aria-hidden") == "true", look
        assert re.search(r"class=", key)
