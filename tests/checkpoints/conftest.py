"""Fixtures for checkpoints: open files, and checkpoints of real DeepSpeed worlds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.checkpoints.samples import Samples
from tpcheck.checkpoints.formats.files import Files


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Samples]:
    """Make each DeepSpeed checkpoint once for all tests."""
    samples = Samples(tmp_path_factory.mktemp("samples"))
    yield samples
    samples.close()


@pytest.fixture
def files() -> Iterator[Files]:
    files = Files()
    yield files
    files.close()
