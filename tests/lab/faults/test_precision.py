"""Every fault of precision is caught at float64, at its place, with its cause."""

import pytest

from tests.lab.faults.finding import require_found
from tpcheck.lab.faults.fault import ModelFault
from tpcheck.lab.faults.precision import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught_placed_and_explained(fault: ModelFault) -> None:
    require_found(fault)
