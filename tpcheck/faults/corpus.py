"""All faults, in the order of their tables."""

from __future__ import annotations

from tpcheck.faults import forward
from tpcheck.faults.fault import ModelFault

MODEL_FAULTS: tuple[ModelFault, ...] = (*forward.FAULTS,)
