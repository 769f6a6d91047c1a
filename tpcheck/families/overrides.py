"""Model types whose small configuration the rules by name cannot give: one row each, with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OVERRIDES: Mapping[str, Mapping[str, Any]] = {}
