"""Checkpoints of real DeepSpeed worlds, made once for all tests."""

from collections.abc import Iterator

import pytest

from tests.checkpoints.samples import Samples


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Samples]:
    made = Samples(tmp_path_factory.mktemp("samples"))
    yield made
    made.close()
