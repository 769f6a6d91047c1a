"""The allowed error follows what was measured, with a floor at the tensor's own rounding."""

from tpcheck.numerics.tolerance import Tolerance, largest_deviations


def test_ten_times_the_largest_deviation_is_allowed() -> None:
    tolerance = Tolerance(1e-7, 8, largest_deviations([{"a": 1.0, "b": 5.0}, {"a": 3.0}]))
    assert tolerance.allowed("a", rounding=0.0) == 10 * 3.0
    assert tolerance.allowed("b", rounding=0.0) == 10 * 5.0


def test_a_tensor_that_stood_still_may_still_round() -> None:
    tolerance = Tolerance(1e-7, 8, {"still": 0.0})
    assert tolerance.allowed("still", rounding=2.0) == 10 * 2.0
    assert tolerance.allowed("never measured", rounding=0.0) == 0
    assert tolerance.allowed_scalar("norm", expected=-4.0) == 10 * 8e-7
