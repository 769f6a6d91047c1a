"""A line of text whose parts may have a style on a terminal; the plain text is the same without it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True, slots=True)
class Line:
    """Pieces of text with the rich style of each, empty for none."""

    spans: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "".join(text for text, _ in self.spans).rstrip()


def plain(text: str, style: str = "") -> Line:
    """Return a line of one piece."""
    return Line(((text, style),))


def labelled(label: str, text: str, style: str = "") -> Iterable[Line]:
    """Yield `text` behind a label that is padded to a column; further lines of it stand under the first."""
    first, *rest = text.splitlines() or [""]
    yield Line((("  ", ""), (f"{label:<10}", "dim"), (first, style)))
    for line in rest:
        yield Line(((" " * 12, ""), (line, style)))


def as_text(lines: Iterable[Line]) -> str:
    """Return the lines as plain text that can be pasted into an issue."""
    return "\n".join(str(line) for line in lines) + "\n"


def as_rich(lines: Iterable[Line]) -> Text:
    """Return the lines for a terminal."""
    from rich.text import Text

    text = Text(overflow="fold", no_wrap=False)
    for line in lines:
        for piece, style in line.spans:
            text.append(piece, style=style)
        text.append("\n")
    text.rstrip()
    return text
