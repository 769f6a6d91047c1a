"""The scale of losses changes as DeepSpeed's does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.backends.loss_scale import LossScale


@given(
    st.integers(1, 3), st.integers(1, 3), st.booleans(), st.sampled_from([1.0, 64.0]),
    st.lists(st.booleans(), max_size=12),
)  # fmt: skip
def test_a_dynamic_scale_is_that_of_deepspeed(
    window: int, hysteresis: int, refills: bool, least: float, overflows: list[bool]
) -> None:
    scalers = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    expected = scalers.DynamicLossScaler(256.0, window, least, hysteresis, refills, raise_error_at_min_scale=False)
    actual = LossScale(256.0, window, least, hysteresis, refills)
    for overflow in overflows:
        _update(expected, overflow)
        actual.update(overflow)
        assert actual.scale == expected.cur_scale


def _update(scaler: object, overflow: bool) -> None:
    """Update DeepSpeed's, which asks for its rank only to print."""
    from unittest.mock import patch

    with patch("deepspeed.runtime.fp16.loss_scaler.dist.get_rank", lambda: 1):
        scaler.update_scale(overflow)  # type: ignore[attr-defined]


def test_a_static_scale_stays() -> None:
    scale = LossScale(128.0)
    scale.update(True)
    scale.update(False)
    assert scale.scale == 128.0
