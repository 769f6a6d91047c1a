"""Digests of generators tell states apart, and leave them alone."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tpcheck.batches import generators
from tpcheck.batches.generators import States, moved, rng_digests, rng_states
from tpcheck.batches.sampling import LeftOut, Log


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
        "import random, numpy, torch; from tpcheck.batches.generators import rng_digests;"
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


def draws() -> list[Callable[[], object]]:
    return [random.random, lambda: random.gauss(0, 1), np.random.random, lambda: np.random.standard_normal(1)]


def test_states_read_in_place_are_those_that_are_told() -> None:
    for draw in draws() * 3:
        assert generators.of_global_python() == generators.of_python(random.getstate())
        assert generators.of_global_numpy(np.random) == generators.of_numpy(np.random.get_state(legacy=False))
        draw()


def test_this_interpreter_and_this_numpy_are_read_in_place() -> None:
    assert generators._words_of_python(random.getstate.__self__) is not None  # type: ignore[attr-defined]
    assert generators._words_of_numpy(np.random.get_bit_generator()) is not None
    assert generators._reserve_of_numpy(np.random) is not None


class Own(random.Random):
    """Lies elsewhere, for all that is known."""


def test_a_generator_of_another_class_is_asked_for_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Own(3)
    own.gauss(0, 1)
    monkeypatch.setattr(random, "getstate", own.getstate)
    before = rng_states()
    assert before.bits("python") == generators.of_python(own.getstate())
    random.random()
    assert moved(before, rng_states()) == ()
    own.random()
    assert moved(before, rng_states()) == ("python",)


@pytest.fixture
def other_numpy() -> Iterator[Callable[[object], None]]:
    kept = np.random.get_bit_generator()
    yield np.random.set_bit_generator
    np.random.set_bit_generator(kept)


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.PCG64])
def test_numpy_with_a_generator_of_another_kind(kind: Callable[[int], object], other_numpy: Any) -> None:
    rng_states()
    other_numpy(kind(5))
    before = rng_states()
    other_numpy(kind(5))
    assert moved(before, rng_states()) == ()
    np.random.random()
    assert moved(before, rng_states()) == ("numpy",)


def test_states_are_kept_as_they_were() -> None:
    before, digests = rng_states(), rng_digests()
    for draw in draws():
        draw()
    torch.rand(1)
    assert dict(before) == digests
    assert set(moved(before, rng_states())) == set(moved(digests, rng_digests())) == {"python", "numpy", "torch"}


def test_states_of_several_places_come_together() -> None:
    both = States({"torch": b"state"}) | {"worker0.torch": "digest"}
    assert isinstance(both, States)
    assert list(both) == ["torch", "worker0.torch"]
    assert ("torch" in both, "cuda" in both, len(both)) == (True, False, 2)
    assert (both.bits("torch"), both.bits("worker0.torch"), both["worker0.torch"]) == (b"state", None, "digest")
    assert moved(both, States({"torch": b"state"}) | {"worker0.torch": "other"}) == ("worker0.torch",)


def test_of_batches_given_out_far_ahead_digests_alone_are_kept() -> None:
    log = Log(None)
    log.start(LeftOut())
    expected = []
    for number in range(20):
        expected.append(rng_digests())
        log.give([number], States(), (), rng_states())
        random.random()
        np.random.random()
        torch.rand(1)
    assert [made.rng.bits("torch") is None for made in log.pending] == [False] * 16 + [True] * 4
    assert [dict(made.rng) for made in log.pending] == expected
    log.finish()  # the batch given last, of which digests are kept, is whole
    assert set(log.pending[-1].drew) == {"python", "numpy", "torch"}
