"""The table of planted faults as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from tpcheck.records.caught import Caught
from tpcheck.records.score import Score, by_kind
from tpcheck.report import words
from tpcheck.report.faults import margin, outcome, summary, true_causes
from tpcheck.report.margins import Panel, margins_svg
from tpcheck.report.pages import page

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
