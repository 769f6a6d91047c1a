"""Known bugs, planted on purpose in what is under test, to prove that a check can fail. Mostly data."""

from tpcheck.faults.corpus import MODEL_FAULTS
from tpcheck.faults.fault import Draw, Live, ModelFault, Place, Planting
from tpcheck.faults.planted import PlantedBackend

__all__ = ["MODEL_FAULTS", "Draw", "Live", "ModelFault", "Place", "PlantedBackend", "Planting"]
