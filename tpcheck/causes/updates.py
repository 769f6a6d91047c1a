"""Why a weight is wrong after an optimizer step whose gradients are right."""

from __future__ import annotations

from tpcheck.causes.explanation import Test

TESTS: tuple[Test, ...] = ()
