"""Every text that users can see stands in `texts.txt`, where it can be read in one go."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.texts import texts as collector
from tests.texts.texts import GOLDEN

texts = cache(collector.texts)  # reads the whole source

# Words of this project alone, and what to say instead.
PRIVATE = {
    r"\btold\b|\btells?\b (?!tpcheck)": "reports, says, shows",
    r"\bunheard\b": "pending",
    r"\bheed(s|ed)?\b": "raises if aborted",
    r"\bmended\b": "fixed",
    r"\bplant(s|ed|ing)?\b": "inject",
    r"\bfed alike\b|\bfed\b": "given, teacher forcing",
    r"\bgist\b": "summary",
    r"\bweightiest\b": "most severe",
    r"\b(ours|theirs)\b": "actual, expected",
    r"\bcry\b|\bcries\b": "false positive",
}


def test_every_text_is_written_down() -> None:
    assert texts() == GOLDEN.read_text(), "run python tests/texts/texts.py, and read the difference"


@pytest.mark.parametrize("pattern", PRIVATE)
def test_no_text_uses_a_private_word(pattern: str) -> None:
    found = [line.strip() for line in texts().splitlines() if re.search(pattern, line)]
    assert found == [], f"say: {PRIVATE[pattern]}"


def test_what_is_collected() -> None:
    """The collector finds messages with placeholders, and leaves out docstrings and code."""
    lines = texts().splitlines()
    assert "    an iterable of batches" in lines
    assert any("{}" in line for line in lines)
    assert not any("from tpcheck import" in line for line in lines)
