"""What can be told without running a model: versions, leftovers of killed runs, traps in a configuration."""

from tpcheck.doctor.advice import Advice
from tpcheck.doctor.diagnosis import Diagnosis, diagnose

__all__ = ["Advice", "Diagnosis", "diagnose"]
