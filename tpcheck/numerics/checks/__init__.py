"""The checks of a run by name, in their order: functions of the evidence, and of the step."""

from __future__ import annotations

from collections.abc import Callable

from tpcheck.core.check_names import (
    CHECK_NAMES,
    CHECKPOINT_CHECK,
    INITIALISATION_CHECK,
    ON_REQUEST,
    RESUME_CHECK,
)
from tpcheck.numerics.checks.gradients import gradients_match_reference
from tpcheck.numerics.checks.optimizer_state import optimizer_state_matches_reference
from tpcheck.numerics.checks.outputs import outputs_match_reference
from tpcheck.numerics.checks.replicas import replicas_agree_after, replicas_agree_at_start
from tpcheck.numerics.checks.start import groups_match_topology, parameters_are_sharded, weights_match_reference
from tpcheck.numerics.checks.updates import gradient_norm_matches_reference, updates_match_reference
from tpcheck.numerics.evidence import CheckOutcome, Evidence

__all__ = [
    "CHECKPOINT_CHECK",
    "CHECK_NAMES",
    "INITIALISATION_CHECK",
    "ON_REQUEST",
    "RESUME_CHECK",
    "START_CHECKS",
    "STEP_CHECKS",
    "CheckOutcome",
]

START_CHECKS: dict[str, Callable[[Evidence], CheckOutcome]] = {
    "groups_match_topology": groups_match_topology,
    "parameters_are_sharded": parameters_are_sharded,
    "weights_match_reference": weights_match_reference,
    "replicas_agree": replicas_agree_at_start,
}

STEP_CHECKS: dict[str, Callable[[Evidence, int], CheckOutcome]] = {
    "outputs_match_reference": outputs_match_reference,
    "gradients_match_reference": gradients_match_reference,
    "gradient_norm_matches_reference": gradient_norm_matches_reference,
    "updates_match_reference": updates_match_reference,
    "optimizer_state_matches_reference": optimizer_state_matches_reference,
    "replicas_agree": replicas_agree_after,
}
