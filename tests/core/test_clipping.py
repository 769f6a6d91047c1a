"""What gradients are multiplied by, and the norm that a factor stands for."""

from __future__ import annotations

from math import isclose

import pytest

from tpcheck.core.clipping import NO_CLIPPING, Clipping

UP = Clipping(2.0, epsilon=0.25, scales_up=True)


@pytest.mark.parametrize("clipping", [Clipping(1.0, epsilon=0.5), UP])
@pytest.mark.parametrize("norm", [1.5, 8.0])
def test_a_factor_gives_back_the_norm(clipping: Clipping, norm: float) -> None:
    assert isclose(clipping.norm(clipping.factor(norm)), norm)


def test_a_norm_of_nothing_and_no_clipping_change_nothing() -> None:
    assert Clipping(1.0, epsilon=0.0).factor(0.0) == NO_CLIPPING.factor(5.0) == 1.0


def test_its_formula_says_what_it_is() -> None:
    assert (str(UP), str(Clipping(1.0, epsilon=0.0))) == ("2 / (norm + 0.25)", "min(1, 1 / norm)")
