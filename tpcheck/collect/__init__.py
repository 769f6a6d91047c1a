"""Live models in, records out: hooks, perturbation and precision while a model runs."""

from tpcheck.collect.hooks import ModuleRecorder
from tpcheck.collect.perturb import perturbed_leaves
from tpcheck.collect.precision import everything_in_float64, nothing_raised

__all__ = ["ModuleRecorder", "everything_in_float64", "nothing_raised", "perturbed_leaves"]
