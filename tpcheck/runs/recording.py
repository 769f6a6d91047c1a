"""The context in which a training loop is recorded."""

from __future__ import annotations
