"""Which packages a run is made of."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("tpcheck", "torch", "transformers")


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that every run uses, where installed; imports none of them."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
