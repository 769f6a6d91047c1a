"""Digests of generators differ where their states do, and reading them changes no state."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tpcheck.batches.generators import GeneratorStates, changed_generators, rng_states
from tpcheck.batches.sampling import SamplerLog


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
def test_a_draw_changes_only_the_digest_of_its_generator(draw: Callable[[], object], name: str) -> None:
    before = dict(rng_states())
    assert dict(rng_states()) == before
    draw()
    assert changed_generators(before, dict(rng_states())) == (name,)


def test_generators_in_a_dataset_are_named_by_their_attributes() -> None:
    images = Images()
    before = dict(rng_states(dataset=images))
    images.random.random()
    images.transform.rng.random()
    images.transform.legacy.random()
    torch.rand(1, generator=images.transform.generator)
    assert changed_generators(before, dict(rng_states(dataset=images))) == (
        "python:dataset.random",
        "numpy:dataset.transform.rng",
        "numpy:dataset.transform.legacy",
        "torch:dataset.transform.generator",
    )


def test_equal_seeds_have_equal_digests_in_any_process() -> None:
    seed = "random.seed(3); numpy.random.seed(3); torch.manual_seed(3)"
    program = (
        f"import random, numpy, torch; from tpcheck.batches.generators import rng_states; {seed};"
        "print(sorted(rng_states().items()))"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)
    exec(seed, {"random": random, "numpy": np, "torch": torch})
    assert printed == f"{sorted(rng_states().items())}\n"


def test_the_second_of_two_normal_numbers_that_numpy_makes_is_a_draw() -> None:
    np.random.seed(0)
    np.random.standard_normal()  # makes two
    before = dict(rng_states())
    np.random.standard_normal()
    assert changed_generators(before, dict(rng_states())) == ("numpy",)


def test_a_generator_that_replaces_pythons_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    replacement = random.Random(3)
    monkeypatch.setattr(random, "getstate", replacement.getstate)
    before = rng_states()
    random.random()
    assert changed_generators(before, rng_states()) == ()
    replacement.random()
    assert changed_generators(before, rng_states()) == ("python",)


@pytest.fixture
def replace_numpy() -> Iterator[Callable[[object], None]]:
    original = np.random.get_bit_generator()
    yield np.random.set_bit_generator
    np.random.set_bit_generator(original)


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.PCG64])
def test_a_bit_generator_that_replaces_numpys_is_read(kind: Callable[[int], object], replace_numpy: Any) -> None:
    replace_numpy(kind(5))
    before = rng_states()
    replace_numpy(kind(5))
    assert changed_generators(before, rng_states()) == ()
    np.random.random()
    assert changed_generators(before, rng_states()) == ("numpy",)


def draw_from_all() -> None:
    random.random()
    random.gauss(0, 1)
    np.random.random()
    np.random.standard_normal(1)
    torch.rand(1)


def test_states_are_those_of_the_moment_they_were_read() -> None:
    before, digests = rng_states(), dict(rng_states())
    draw_from_all()
    assert dict(before) == digests
    assert (
        set(changed_generators(before, rng_states()))
        == set(changed_generators(digests, dict(rng_states())))
        == {"python", "numpy", "torch"}
    )


def test_raw_states_and_digests_can_be_mixed() -> None:
    both = GeneratorStates({"torch": b"state"}) | {"worker0.torch": "digest"}
    assert isinstance(both, GeneratorStates)
    assert list(both) == ["torch", "worker0.torch"]
    assert ("torch" in both, "cuda" in both, len(both)) == (True, False, 2)
    assert (both.raw("torch"), both.raw("worker0.torch"), both["worker0.torch"]) == (b"state", None, "digest")
    assert changed_generators(both, GeneratorStates({"torch": b"state"}) | {"worker0.torch": "other"}) == (
        "worker0.torch",
    )


def test_of_batches_requested_far_ahead_only_digests_are_kept() -> None:
    log = SamplerLog(persistent=None)
    log.start_epoch()
    expected = []
    for number in range(20):
        expected.append(dict(rng_states()))
        log.add([number], GeneratorStates(), (), rng_states())
        draw_from_all()
    assert [each.rng.raw("torch") is None for each in log.pending] == [False] * 16 + [True] * 4
    assert [dict(each.rng) for each in log.pending] == expected
    log.batch_made()  # the latest one, of which digests are kept
    assert set(log.pending[-1].drew) == {"python", "numpy", "torch"}
