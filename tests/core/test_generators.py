"""Python's, NumPy's and torch's generators are seeded and put back together."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy
import torch

from tpcheck.core.generators import generators_kept, seed_everything


def test_generators_are_put_back_also_after_an_error() -> None:
    def numbers() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(numpy.random.random())

    seed_everything(1)
    expected = numbers()
    seed_everything(1)
    with suppress(ZeroDivisionError), generators_kept():
        seed_everything(2)
        raise ZeroDivisionError
    assert numbers() == expected
