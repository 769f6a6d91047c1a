"""The command that repeats a verification."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

_DEFAULTS = {"backend": "deepspeed", "tp": None, "dp": 1, "zero": 0, "dtype": "float64", "steps": 2, "seed": 0}


def verify_command(subject: Mapping[str, Any]) -> str:
    """Return `tpcheck verify ...` for the subject of a report; options at their defaults are left out.

    Example:
        >>> verify_command({"family": "phi", "tp": 2, "dp": 1, "settings": {"qk_layernorm": True}, "config": {}})
        'tpcheck verify phi --tp 2 --set qk_layernorm=true'
    """
    words = ["tpcheck", "verify", str(subject["family"])]
    for option, default in _DEFAULTS.items():
        if subject.get(option, default) != default:
            words += [f"--{option}", str(subject[option])]
    for key, value in subject.get("settings", {}).items():
        words += ["--set", f"{key}={json.dumps(value)}"]
    if subject.get("config"):
        words += ["--config", json.dumps(subject["config"])]
    if subject.get("ignore_plan"):
        words.append("--ignore-plan")
    return shlex.join(words)
