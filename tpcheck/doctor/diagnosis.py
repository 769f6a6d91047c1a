"""Everything that can be seen without running a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcheck.doctor.advice import Advice
from tpcheck.doctor.deepspeed_config import config_advice
from tpcheck.doctor.devices import devices
from tpcheck.doctor.leftovers import extension_caches, leaked_shared_memory, stale_locks
from tpcheck.doctor.saving import Saved, what_is_saved
from tpcheck.doctor.versions import bad_versions, installed_versions


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the doctor saw.

    Attributes:
        versions: By package name; None where it is not installed.
        devices: Processors and accelerators, in words.
        advice: What is wrong; nothing when all is well.
        saved: What each way of saving will write under the configuration; nothing without one.
    """

    versions: Mapping[str, str | None]
    devices: tuple[str, ...]
    advice: tuple[Advice, ...]
    saved: tuple[Saved, ...] = ()


def _home() -> Path:
    """Return the user's folder; of a user who has none the folder `~` here, where torch then looks."""
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and no line in /etc/passwd, as under `docker run --user 12345`
        return Path("~")


def diagnose(config: Mapping[str, Any] | None = None) -> Diagnosis:
    """Return what is wrong on this machine and, if one is given, in a DeepSpeed configuration."""
    versions = installed_versions()
    advice = (
        *bad_versions(versions),
        *stale_locks(extension_caches(os.environ, _home())),
        *leaked_shared_memory(),
        *(config_advice(config) if config is not None else ()),
    )
    saved = tuple(what_is_saved(config)) if config is not None else ()
    return Diagnosis(versions, devices(), advice, saved)
