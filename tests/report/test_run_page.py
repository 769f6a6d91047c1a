"""The page about two compared runs, on pictures made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from math import inf, nan

import pytest

from tests.schema import document
from tpcheck.core.findings import CheckResult, Coverage, Finding, Verdict
from tpcheck.report.report import Report
from tpcheck.report.run_page import MOST_MARKS, thinned
from tpcheck.report.run_picture import RunComparison, ShardOfTiles, TensorPoint, TileMap

NAMES = ("model.embed_tokens", *(f"model.layers.{layer}.mlp" for layer in range(3)), "lm_head")
WRONG = "model.layers.1.mlp"
FINDING = Finding(
    "outputs_match_reference",
    {"phase": "forward", "step": 1, "module": WRONG, "field": "output", "ranks": [1]},
    0.03,
    1e-6,
    "missing_reduce",
    {"dtype": "float32", "replays": 2},
    "tpcheck compare tp2.trace tp1.trace",
)
SUBJECT = {
    "subject": "tp2.trace",
    "tp": 2,
    "dp": 1,
    "dtype": "float32",
    "steps": 2,
    "replays": 2,
    "expected": "tp1.trace",
    "expected_tp": 1,
    "expected_dp": 1,
    "expected_dtype": "bfloat16",
}
COVERAGE = Coverage(
    40, 42, {"step 7": "the expected run has no such step", "step 8": "the expected run has no such step"}
)
FAILED = Verdict(
    "failed",
    SUBJECT,
    {"torch": "2.13.0"},
    (FINDING,),
    (CheckResult("outputs_match_reference", 20, 3e4, f"output of {WRONG}, step 1"),),
    COVERAGE,
)
PASSED = replace(FAILED, verdict="passed", findings=())


def point(
    step: int = 0, name: str = WRONG, error: float = 1e-7, allowed: float | None = 1e-6, **other: object
) -> TensorPoint:
    is_wrong = allowed is not None and error > allowed
    values = {"phase": "forward", "order": 0, "label": f"output of {name}", "is_wrong": is_wrong, **other}
    return TensorPoint(step=step, name=name, relative_error=error, relative_allowed=allowed, **values)  # type: ignore[arg-type]


def tile_map(shape: tuple[int, ...] = (32, 64), shards: Sequence[ShardOfTiles] = (), error: float = 1e-3) -> TileMap:
    errors = tuple(tuple(error * (row + 1) for _ in range(16)) for row in range(16))
    return TileMap(1, "forward", f"output of {WRONG}", shape, errors, tuple(shards))


def steps(number: int = 2) -> tuple[TensorPoint, ...]:
    return tuple(
        point(step, name, 0.03 if (step, name) == (1, WRONG) else 1e-7, phase=phase)
        for step in range(number)
        for phase in ("forward", "backward")
        for name in NAMES
    )


PICTURE = RunComparison(
    steps(),
    (tile_map(shards=(ShardOfTiles((0,), 0, 7, 0, 15), ShardOfTiles((1,), 8, 15, 0, 15))),),
    ((0, 3.5, 3.5), (1, 3.25, 3.0)),
)


class Page(HTMLParser):
    """What a browser makes of a page: its tags, its visible texts, its titles and text alternatives."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.within: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.within.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [
            found for name, found in self.tags
            if name == tag and all(found.get(key.rstrip("_")) == value for key, value in attributes.items())
        ]  # fmt: skip

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page(verdict: Verdict = FAILED, picture: RunComparison = PICTURE) -> Page:
    return Page(Report(verdict, picture).to_html())


def test_a_page_says_what_was_compared_and_where_the_runs_part() -> None:
    text = page().text
    assert f"First wrong place: {WRONG} output (forward of step 1, rank 1); likely cause: missing_reduce." in text
    assert "2 steps compared; what rounding does was measured by 2 replays." in text
    for part in ("tp2.trace", "tp1.trace", "bfloat16", "torch 2.13.0", "Step 1: loss 3.25, expected 3"):
        assert part in text


def test_a_page_has_the_findings_the_checks_and_the_coverage_of_the_text() -> None:
    report = Report(FAILED, PICTURE)
    text = page().text
    for line in report.to_text().splitlines():
        words = line.split()
        if words and words[0] in ("observed", "allowed", "cause", "again", "outputs_match_reference"):
            assert " ".join(words) in text
    assert "40 of 42 tensors compared" in text
    assert "the expected run has no such step: step 7, step 8" in text


def test_every_tensor_is_a_mark_with_its_name_and_numbers() -> None:
    text = page().text
    for name in NAMES:
        assert text.count(f"output of {name}: error 1.0e-07, allowed 1.0e-06, margin 0.1") >= 2
    assert f"output of {WRONG}: error 3.0e-02, allowed 1.0e-06, margin 3.0e+04" in text


def test_only_the_first_wrong_place_is_pointed_out() -> None:
    found = page()
    assert len(found.all("text", class_="pointed")) == 1
    assert page(PASSED).all("text", class_="pointed") == []


@pytest.mark.parametrize(
    ("where", "phase", "name"),
    [
        ({"phase": "backward", "step": 1, "parameter": "a.weight"}, "gradient", "a.weight"),
        ({"phase": "update", "step": 1, "parameter": "a.weight"}, "update", "a.weight"),
        ({"phase": "update", "step": 1, "parameter": "a.weight", "field": "exp_avg of a.weight"}, "state", "a.weight"),
        ({"phase": "backward", "step": 1, "module": "a", "field": "gradient of output"}, "backward", "a"),
        ({"phase": "start", "parameter": "a.weight"}, "start", "a.weight"),
        ({"phase": "update", "step": 1, "module": "a", "field": "buffer a.mean"}, "update", "a.mean"),
    ],
)
def test_the_place_of_any_finding_is_found_among_the_points(where: dict[str, object], phase: str, name: str) -> None:
    step = -1 if phase == "start" else 1
    label = "buffer a.mean" if name == "a.mean" else name
    picture = RunComparison((point(step, name, phase=phase, label=label), point(step, "b", phase=phase)))
    found = page(replace(FAILED, findings=(replace(FINDING, where=where),)), picture)
    assert len(found.all("text", class_="pointed")) == 1


def test_a_finding_that_follows_from_another_is_not_the_first_wrong_place() -> None:
    follows = replace(
        FINDING, where={"phase": "forward", "step": 0, "module": "lm_head"}, cause=None, evidence={"follows_from": "x"}
    )
    assert f"First wrong place: {WRONG}" in page(replace(FAILED, findings=(follows, FINDING))).text


def test_every_picture_has_a_text_that_replaces_it() -> None:
    pictures = [svg for svg in page().all("svg") if not svg.get("aria-hidden")]
    assert len(pictures) == 6  # all steps; two phases of two steps; one tensor's tiles
    for svg in pictures:
        assert svg["role"] == "img"
        assert "rror" in (svg["aria-label"] or "")
    assert any(WRONG in (svg["aria-label"] or "") for svg in pictures)


def test_tiles_name_their_rows_columns_and_ranks_and_shards_have_borders() -> None:
    found = page()
    assert "rows 0 to 1, columns 60 to 63 (rank 0): error 1.0e-03" in found.text
    assert "rows 30 to 31, columns 0 to 3 (rank 1): error 1.6e-02" in found.text
    assert len(found.all("rect", class_="shard")) == 2


def test_a_tensor_that_each_rank_holds_whole_has_no_borders() -> None:
    found = page(picture=replace(PICTURE, tile_maps=(tile_map(shards=(ShardOfTiles((0, 1), 0, 15, 0, 15),)),)))
    assert found.all("rect", class_="shard") == []
    assert "held whole by ranks 0, 1" in found.text


def test_ranks_whose_shards_share_tiles_have_one_border() -> None:
    shards = [ShardOfTiles((rank,), rank // 4, rank // 4, 0, 15) for rank in range(64)]
    found = page(picture=replace(PICTURE, tile_maps=(tile_map(shards=shards),)))
    assert len(found.all("rect", class_="shard")) == 16
    assert "60 to 63" in found.text


@pytest.mark.parametrize(
    ("shape", "holds", "number"),
    [
        ((), "element 0: ", 1),
        ((5,), "element 4: ", 5),
        ((1000,), "elements 0 to 3: ", 256),
        ((3, 5), "row 2, column 4: ", 15),
        ((2, 16, 8), "rows 2 to 3, column 7: ", 128),
        ((-1, -1, 32), "positions from 15/16 of the sample on, columns 30 to 31: ", 256),
        ((0, 4), "rows, column 3: ", 4),
    ],
)
def test_tiles_of_any_shape_are_drawn_where_they_hold_something(
    shape: tuple[int, ...], holds: str, number: int
) -> None:
    found = page(picture=replace(PICTURE, tile_maps=(tile_map(shape),)))
    tiles = [tile for tile in found.all("rect") if (tile.get("class") or "").startswith("tile") and "y" in tile]
    assert len(tiles) == number
    assert holds in found.text


def test_short_samples_leave_no_empty_rows_between_tiles() -> None:
    errors = tuple(tuple(1e-3 if row % 2 == 0 else 0.0 for _ in range(16)) for row in range(16))
    found = page(picture=replace(PICTURE, tile_maps=(replace(tile_map((-1, -1, 16)), relative_errors=errors),)))
    tiles = [tile for tile in found.all("rect") if (tile.get("class") or "").startswith("tile") and "y" in tile]
    assert len(tiles) == 8 * 16


HOSTILE = "</title></svg><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\n\x00\ud800"


def test_names_and_messages_of_strangers_are_only_ever_text() -> None:
    subject = {
        **SUBJECT,
        "subject": HOSTILE,
        "expected": HOSTILE,
        "dtype": HOSTILE,
        "versions_differ": {HOSTILE: HOSTILE},
    }
    finding = replace(FINDING, where={"phase": "forward", "step": 0, "module": HOSTILE}, evidence={"note": HOSTILE})
    verdict = replace(
        FAILED,
        subject=subject,
        environment={HOSTILE: HOSTILE},
        findings=(finding,),
        checks=(CheckResult(HOSTILE, 1, 1.0, HOSTILE),),
        coverage=Coverage(1, 2, {HOSTILE: HOSTILE}),
        message=HOSTILE,
    )
    points = (point(name=HOSTILE, label=HOSTILE), point(name=HOSTILE, label=HOSTILE, step=1))
    tiles = replace(tile_map(), label=HOSTILE)
    text = Report(verdict, RunComparison(points, (tiles,))).to_html()
    found = Page(text)
    assert len(found.all("script")) == 1
    assert found.all("img") == []
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    text.encode()


def test_a_page_loads_nothing() -> None:
    found = page()
    assert not [tag for tag, attributes in found.tags if {"src", "href", "xlink:href", "action"} & attributes.keys()]
    assert "url(" not in Report(FAILED, PICTURE).to_html()
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in found.all("meta"))


def test_all_steps_are_there_without_scripts() -> None:
    sections = page().all("section")
    assert [section["data-step"] for section in sections] == ["0", "1"]
    assert not any("hidden" in section for section in sections)
    assert page().all("div", id="steps")[0]["data-selected"] == "1"


def test_an_empty_comparison_is_a_page_without_charts() -> None:
    skipped = Verdict("skipped", {**SUBJECT, "steps": 0}, {}, message="the runs have no step in common")
    found = page(skipped, RunComparison())
    assert "Nothing was decided. 0 steps compared" in found.text
    assert "the runs have no step in common" in found.text
    assert found.all("section") == []
    assert [svg for svg in found.all("svg") if not svg.get("aria-hidden")] == []


def test_a_verdict_without_a_subject_is_a_page() -> None:
    assert "error" in page(Verdict("error", {}, {}, message="it broke"), RunComparison()).text


@pytest.mark.parametrize("error", [0.0, inf, nan, 1e308, 5e-324])
@pytest.mark.parametrize("allowed", [None, 0.0, 1e-6, inf, nan])
def test_numbers_that_are_not_finite_or_have_no_logarithm_are_drawn(error: float, allowed: float | None) -> None:
    points = tuple(point(step, error=error, allowed=allowed) for step in (-1, 0, 1))
    picture = RunComparison(points, (tile_map(error=error),), ((0, nan, inf),))
    found = page(FAILED, picture)
    assert found.all("section")
    assert not any(
        "nan" in (value or "") for tag, attributes in found.tags for key, value in attributes.items() if key in "xydr"
    )
    document(Report(FAILED, picture).to_json(), "report")


def test_tensors_whose_allowance_was_not_measured_look_different() -> None:
    found = page(PASSED, RunComparison((point(allowed=None), point(error=0.0, allowed=None))))
    assert len(found.all("path", class_="unmeasured")) == 2  # one in the legend
    assert len(found.all("circle", class_="within")) == 2
    assert "allowed: not measured" in found.text


def test_of_many_tensors_the_worst_of_each_few_neighbours_are_drawn_and_the_chart_says_so() -> None:
    points = [point(name=f"m.{index}", error=1e-7 if index % 10 else 2e-7) for index in range(2000)]
    assert len(thinned(points)) == MOST_MARKS
    found = page(PASSED, RunComparison(tuple(points)))
    assert len(found.all("circle", class_="within")) == MOST_MARKS + 1
    assert "2000 tensors; 400 drawn, the worst of each 5 neighbours" in found.text
    kept = points[3]
    assert kept in thinned(points, kept)


def test_a_page_of_a_thousand_modules_and_a_hundred_steps_stays_below_five_megabytes() -> None:
    name = "model.layers.17.self_attention." + '"' * 200  # each takes six characters
    right = point(name=name)
    points = [replace(right, step=step) for step in range(100) for _ in range(1000)]
    wrong = point(70, name=name, error=0.1)
    verdict = replace(
        FAILED,
        findings=tuple(replace(FINDING, where={"phase": "forward", "step": 70, "module": name}) for _ in range(300)),
    )
    picture = RunComparison((*points, wrong), (tile_map(),) * 12, ())
    text = Report(verdict, picture).to_html()
    assert len(text.encode()) < 5_000_000
    found = Page(text)
    drawn = [section["data-step"] for section in found.all("section")]
    assert {"0", "70", "99"} <= set(drawn)
    assert f"{len(drawn)} of 100 steps are drawn tensor by tensor" in found.text
    assert "and 260 more; --json has them all" in found.text


def test_json_holds_what_the_page_draws() -> None:
    data = document(Report(FAILED, PICTURE).to_json(), "report")["picture"]
    assert data["points_total"] == len(data["points"]) == len(PICTURE.points)
    assert data["points"][0] == {
        "step": 0,
        "phase": "forward",
        "order": 0,
        "name": NAMES[0],
        "label": f"output of {NAMES[0]}",
        "relative_error": 1e-7,
        "relative_allowed": 1e-6,
        "is_wrong": False,
    }
    assert data["losses"] == [[0, 3.5, 3.5], [1, 3.25, 3.0]]
    assert data["tile_maps"][0]["shape"] == [32, 64]
    assert data["tile_maps"][0]["shards"][1]["ranks"] == [1]


def test_other_reports_have_no_picture() -> None:
    report = Report(FAILED)
    assert "picture" not in report.to_data()
    assert "<svg" not in report.to_html()
