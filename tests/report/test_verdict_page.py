"""The page about one run, and the one about a checkpoint: whole, without a network, and readable without colours."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from math import inf
from pathlib import Path

import pytest

from tests.report.examples import ERROR, FAILED, GRADIENT, NORM, PASSED, SKIPPED, WEIGHT
from tests.report.test_model_tree import modules
from tpcheck.core.findings import Finding, ModuleMargins, Verdict
from tpcheck.report.checkpoint_page import StoredTensor, StoredTensors
from tpcheck.report.error_maps import map_of_finding
from tpcheck.report.report import Report
from tpcheck.report.verdict_page import MOST_ROWS

MAP = {
    "shape": [4, 6],
    "tiles": [[0.0] * 6, [0.0] * 6, [0.5] * 6, [0.0, 0.25, 0, 0, 0, None]],
    "shards": [
        {"ranks": [0], "rows": [0, 2], "columns": [0, 6]},
        {"ranks": [1], "rows": [2, 4], "columns": [0, 6]},
    ],
}
WITH_MAP = replace(GRADIENT, evidence={**GRADIENT.evidence, "error_map": MAP})
WRONG = "model.layers.0.self_attn.q_norm"
TREE = modules(**{WRONG: 2e12})
CHECKPOINT = Verdict(
    "failed",
    {"subject": "saved/", "actual": "safetensors", "reference": "reference/ (safetensors)", "names": []},
    {"torch": "2.13.0"},
    tuple(
        Finding(
            "checkpoint_matches_reference",
            {"parameter": f"layers.{layer}.q.weight", "index": [0, 3]},
            2.0,
            0.0,
            "shard_order_swapped",
            {
                "count_differing": 2,
                "count_total": 8,
                "count_tensors": 4,
                "actual": 0.125,
                "expected": -1.0,
                "story": {"dim": 0, "order": [1, 0]},
            },
        )
        for layer in range(2)
    ),
)
STORED = StoredTensors(
    (
        *(
            StoredTensor(f"layers.{layer}.{name}.weight", "different" if name == "q" else "equal", (2, 4), "float32")
            for layer in range(2)
            for name in ("q", "k")
        ),
        StoredTensor("extra", "unexpected"),
    )
)


class _Page(HTMLParser):
    """Collects what a test asks about: open tags, headings, text, and what would be loaded."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.loads: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [str(values[name]) for name in ("src", "href", "action") if name in values]
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "svg":
            assert values.get("role") == "img" or values.get("aria-hidden") == "true"
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if (self.open and self.open[-1] in ("h1", "h2", "h3")) or {"h1", "h2", "h3"} & set(self.open[-2:]):
            self.headings[-1] += data
        if self.rows and {"td", "th"} & set(self.open[-2:]):
            self.rows[-1][-1] += data


def parsed(page: str) -> _Page:
    found = _Page(page)
    assert page.startswith("<!doctype html>")
    assert not found.open
    assert found.loads == []
    return found


@pytest.mark.parametrize("verdict", [PASSED, FAILED, ERROR, SKIPPED], ids=lambda verdict: verdict.verdict)
def test_every_verdict_has_a_page_that_begins_with_it(verdict: Verdict) -> None:
    page = Report(verdict).to_html()
    assert " ".join(parsed(page).headings[0].split()) == f"{verdict.verdict} {verdict.subject['family']}"
    assert f"<title>{verdict.verdict}: {verdict.subject['family']}, deepspeed, tp=2" in page


def test_the_page_has_every_finding_and_every_check() -> None:
    page = Report(FAILED).to_html()
    assert page.count('<section class="finding">') == len(FAILED.findings)
    assert all(f'<th scope="row" class="">{check.check}</th>' in page for check in FAILED.checks)
    assert "partial_gradient_on_replica: the sum of the ranks&#39; gradients equals the expected one" in page
    assert "ValueError: style" in Report(ERROR).to_html()


def test_a_finding_without_a_place_has_its_moment_alone() -> None:
    page = Report(replace(FAILED, findings=(GRADIENT, NORM))).to_html()
    assert '<summary>gradient_norm_matches_reference <span class="dim">optimizer step 1</span>' in page


def test_the_tree_says_what_is_wrong_without_colour() -> None:
    page = Report(replace(FAILED, findings=(WITH_MAP, NORM), modules=TREE)).to_html()
    rows = [[cell.strip() for cell in row] for row in parsed(page).rows]
    assert ["q_norm", "✓ 0.125", "✗ 2.0e+12", "", "first wrong"] in rows
    assert ["self_attn", "✓ 0.125", "✓ 0.25", "✗ 2.0e+12 (1 of 2 wrong)", ""] in rows
    assert ["layers", "", "", "✗ 2.0e+12 (1 of 12 wrong)", ""] in rows
    assert page.count('id="first-wrong"') == 1
    assert "A margin is the observed error divided by the largest error that rounding explains" in page


def test_only_the_path_to_the_first_wrong_module_is_open() -> None:
    page = Report(replace(FAILED, findings=(WITH_MAP,), modules=TREE)).to_html()
    assert page.count('data-open="true"') == 5  # the model, model, layers, layer 0, its attention
    assert page.count('data-open="false"') == 4


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
def test_a_browser_folds_and_unfolds_the_tree(tmp_path: Path) -> None:
    act = """<script>
    const shown = () => document.querySelectorAll("table.tree tbody tr:not([hidden])").length;
    const counts = [shown()];
    const folded = document.querySelector("button.toggle[aria-expanded=false]");
    for (const button of [folded, folded, ...document.querySelectorAll(".controls button")]) {
      button.click();
      counts.push(shown());
    }
    document.title = [folded.ariaLabel, ...counts].join();
    </script></body>"""
    page = Report(replace(FAILED, findings=(WITH_MAP,), modules=TREE)).to_html()
    (tmp_path / "page.html").write_text(page.replace("</body>", act))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path}/u"]
    done = subprocess.run([*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120)
    assert "<title>what is inside of model.layers.0.mlp,11,12,11,17,11</title>" in done.stdout


def test_a_large_model_leaves_out_what_is_inside_of_modules_without_a_mistake() -> None:
    page = Report(replace(FAILED, findings=(WITH_MAP,), modules=modules(1000, **{WRONG: 2e12}))).to_html()
    assert page.count('<th scope="row"') <= MOST_ROWS
    assert "modules left out that hold no mistake" in page
    assert 'id="first-wrong"' in page


def test_the_map_shows_where_the_error_lies_and_whose_shards_they_are() -> None:
    page = Report(replace(FAILED, findings=(WITH_MAP,))).to_html()
    assert "largest error in row 3, column 5: inf; lines are borders between the shards of ranks" in page
    assert page.count('class="shard"') == 2
    assert page.count("<title>row ") == 24
    assert ">rank 1</text>" in page


def test_a_vector_that_every_rank_holds_is_a_strip_without_borders() -> None:
    shards = [{"ranks": [0, 1], "rows": [0, 1], "columns": [0, 3]}]
    tiles = {"shape": [3], "tiles": [[0.0, 1.0, 0.5]], "shards": shards}
    drawn = map_of_finding(replace(GRADIENT, evidence={"error_map": tiles}))
    assert drawn is not None
    assert drawn.caption == "3 elements; largest error in element 1: 1.0e+00; ranks 0, 1 hold all of it"
    assert 'class="shard"' not in drawn.svg


@pytest.mark.parametrize("tiles", [[], [[0.0, 0.0]]])
def test_without_an_error_there_is_no_map(tiles: list[list[float]]) -> None:
    evidence = {"error_map": {"shape": [2], "tiles": tiles, "shards": []}}
    assert map_of_finding(replace(WEIGHT, evidence=evidence)) is None


def test_names_from_a_model_cannot_break_the_page() -> None:
    name = "</script><script>alert(1)</script>"
    verdict = replace(
        FAILED, findings=(replace(WITH_MAP, where={"module": name}),), modules=(ModuleMargins(name, inf),)
    )
    page = Report(verdict).to_html()
    parsed(page)
    assert "<script>alert" not in page


def test_what_the_register_says_stands_below_the_verdict() -> None:
    assert "known-bug: it is so" in Report(FAILED).to_html(upstream="upstream  known-bug: it is so")


def test_a_checkpoint_is_a_tree_of_tensors() -> None:
    page = Report(CHECKPOINT, STORED).to_html()
    found = parsed(page)
    rows = [[cell.strip() for cell in row] for row in found.rows]
    assert " ".join(found.headings[0].split()) == "failed checkpoint saved/"
    assert "Of 5 tensors: 2 equal, 2 different, 1 unexpected; most: shard_order_swapped." in page
    assert [
        "q.weight", "✗ differs", "2 x 4", "float32", "shard_order_swapped", "2 of 8", "[0, 3]: 0.125, expected -1",
    ] in rows  # fmt: skip
    assert ["layers", "✗ differs (2 of 4)", "", "", "", "", ""] in rows
    assert ["extra", "✗ unexpected", "", "", "", "", ""] in rows
    assert any(row[0] == "2 of 4 tensors" and row[2] == "layers.0.q.weight, layers.1.q.weight" for row in rows)


def test_equal_checkpoints_say_so() -> None:
    equal = StoredTensors(tuple(replace(tensor, state="equal") for tensor in STORED.tensors))
    page = Report(replace(CHECKPOINT, verdict="passed", findings=()), equal).to_html()
    assert "Equal to the bit: 5 of 5 tensors." in page
    assert 'class="wrong"' not in page


def test_a_finding_that_follows_from_another_has_no_map() -> None:
    follows = replace(WITH_MAP, cause=None, evidence={**WITH_MAP.evidence, "follows_from": "outputs_match_reference"})
    page = Report(replace(FAILED, findings=(GRADIENT, WITH_MAP, follows))).to_html()
    assert page.count('<figure class="map">') == 1


def test_the_tree_has_the_first_finding_of_a_tensor() -> None:
    later = replace(CHECKPOINT.findings[0], cause="all_zero")
    page = Report(replace(CHECKPOINT, findings=(*CHECKPOINT.findings, later)), STORED).to_html()
    assert "all_zero" not in [row[4].strip() for row in parsed(page).rows if row[0].strip() == "q.weight"]
