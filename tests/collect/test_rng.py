"""Digests of generators tell states apart, and leave them alone."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tpcheck.collect.rng import moved, rng_digests


class Augmentation:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.legacy = np.random.RandomState(0)
        self.generator = torch.Generator()


class Images:
    def __init__(self) -> None:
        self.random = random.Random(0)
        self.transform = Augmentation()


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (random.random, "python"),
        (lambda: random.gauss(0, 1), "python"),
        (np.random.random, "numpy"),
        (lambda: np.random.standard_normal(1), "numpy"),
        (lambda: torch.rand(1), "torch"),
    ],
)
def test_a_draw_moves_the_digest_of_its_generator_alone(draw: Callable[[], object], name: str) -> None:
    before = rng_digests()
    assert rng_digests() == before
    draw()
    assert moved(before, rng_digests()) == (name,)


def test_generators_of_a_dataset_have_names() -> None:
    images = Images()
    before = rng_digests(dataset=images)
    images.random.random()
    images.transform.rng.random()
    images.transform.legacy.random()
    torch.rand(1, generator=images.transform.generator)
    assert moved(before, rng_digests(dataset=images)) == (
        "python:dataset.random",
        "numpy:dataset.transform.rng",
        "numpy:dataset.transform.legacy",
        "torch:dataset.transform.generator",
    )


def test_equal_seeds_have_equal_digests_in_any_process() -> None:
    program = (
        "import random, numpy, torch; from tpcheck.collect.rng import rng_digests;"
        "random.seed(3); numpy.random.seed(3); torch.manual_seed(3); print(sorted(rng_digests().items()))"
    )
    printed = [subprocess.check_output([sys.executable, "-c", program], text=True) for _ in range(2)]
    assert printed[0] == printed[1]


def test_a_normal_number_that_numpy_holds_in_reserve_is_a_draw() -> None:
    np.random.seed(0)
    np.random.standard_normal()  # makes two
    before = rng_digests()
    np.random.standard_normal()
    assert moved(before, rng_digests()) == ("numpy",)
