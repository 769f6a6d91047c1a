"""All faults, in the order of their tables."""

from __future__ import annotations

from tpcheck.faults import (
    averaging,
    checkpoint,
    column_parallel,
    data,
    gradients,
    heads,
    input_gradients,
    layout,
    norms,
    partial_gradients,
    precision,
    replicas,
    row_parallel,
    steps,
    vocabulary,
)
from tpcheck.faults.checkpoint import CheckpointFault
from tpcheck.faults.data import DataFault
from tpcheck.faults.fault import ModelFault

MODEL_FAULTS: tuple[ModelFault, ...] = (
    *row_parallel.FAULTS,
    *column_parallel.FAULTS,
    *vocabulary.FAULTS,
    *layout.FAULTS,
    *heads.FAULTS,
    *input_gradients.FAULTS,
    *partial_gradients.FAULTS,
    *gradients.FAULTS,
    *replicas.FAULTS,
    *norms.FAULTS,
    *averaging.FAULTS,
    *steps.FAULTS,
    *precision.FAULTS,
)
CHECKPOINT_FAULTS: tuple[CheckpointFault, ...] = checkpoint.FAULTS
DATA_FAULTS: tuple[DataFault, ...] = data.FAULTS

Fault = ModelFault | CheckpointFault | DataFault
FAULTS: tuple[Fault, ...] = (*MODEL_FAULTS, *DATA_FAULTS, *CHECKPOINT_FAULTS)
