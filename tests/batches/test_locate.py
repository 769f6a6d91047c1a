"""How the first value that differs is shown, and what one rank counts against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tpcheck.batches.leaves import leaf_contents
from tpcheck.batches.locate import _value
from tpcheck.core.digests import flat_bytes


@pytest.mark.parametrize(
    ("batch", "shown"),
    [
        (torch.tensor([7]), 7),
        (torch.tensor([0.5]), 0.5),
        (torch.tensor([True]), True),
        (torch.tensor([-0.0]), "-0.0 (bits 80000000)"),
        (torch.tensor([float("nan")]), "nan (bits 7fc00000)"),
        (np.array([1.5]), 1.5),
        (np.array(["a"]), "a"),
    ],
    ids=str,
)
def test_a_value_is_shown_with_its_bits_where_numbers_look_the_same(batch: Any, shown: Any) -> None:
    (leaf,) = leaf_contents(batch)
    assert leaf.tensor is not None
    assert _value(leaf, flat_bytes(leaf.tensor)) == shown
