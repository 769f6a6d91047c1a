"""Why a weight is not the reference's before the first step."""

from __future__ import annotations

from tpcheck.causes.explanation import Test

TESTS: tuple[Test, ...] = ()
