"""What the documentation says of the tree is so: every path it names exists, every link leads somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_PATH = re.compile(r"`((?:[a-z_]+/)+[a-z_]*(?:\.[a-z]+)?)(?:`| )")
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def paths() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        if page.name == "compared.md":  # names files of other projects
            continue
        for path in dict.fromkeys(_PATH.findall(page.read_text())):
            if page.name in ("architecture.md", "CONTRIBUTING.md") or path.startswith(
                ("tpcheck/", "tests/", "docs/", "ci/")
            ):
                yield page.name, path


@pytest.mark.parametrize(("page", "path"), list(paths()))
def test_a_path_exists(page: str, path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / "tpcheck" / path).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert [link for link in _LINK.findall(page.read_text()) if not (page.parent / link).exists()] == []


def test_architecture_has_a_paragraph_for_each_folder() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    folders = [path.name for path in (ROOT / "tpcheck").iterdir() if (path / "__init__.py").exists()]
    assert [folder for folder in folders if f"`{folder}/`" not in text] == []
