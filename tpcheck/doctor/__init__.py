"""Checks without running a model: versions, leftovers of killed runs, problems of a DeepSpeed configuration."""

from tpcheck.doctor.advice import Advice
from tpcheck.doctor.diagnosis import Diagnosis, diagnose

__all__ = ["Advice", "Diagnosis", "diagnose"]
