"""The names of the checks of a run, in their order; `numerics/checks/` has what they do. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

_BEFORE_STEPS = (
    "groups_match_topology",
    "parameters_are_sharded",
    "weights_match_reference",
)
CHECK_NAMES = (
    *_BEFORE_STEPS,
    "replicas_agree",
    "outputs_match_reference",
    "gradients_match_reference",
    "gradient_norm_matches_reference",
    "updates_match_reference",
    "optimizer_state_matches_reference",
)
"""The checks that run where none is named."""

INITIALISATION_CHECK = "initialisation_matches_reference"
CHECKPOINT_CHECK = "checkpoint_matches_reference"
"""Compares files, not evidence: `verify` runs it where it is named."""
RESUME_CHECK = "resume_matches_uninterrupted"

ON_REQUEST = (INITIALISATION_CHECK, CHECKPOINT_CHECK, RESUME_CHECK)
"""The checks that `verify` runs only where they are named."""


def need_steps(checks: Sequence[str]) -> bool:
    """Return whether any of these checks needs training steps."""
    return any(check not in {*_BEFORE_STEPS, INITIALISATION_CHECK, RESUME_CHECK} for check in checks)
