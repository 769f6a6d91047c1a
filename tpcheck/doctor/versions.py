"""Which versions are installed, and which of them are known to be bad. Imports none of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

from tpcheck.doctor.advice import Advice

PACKAGES = ("tpcheck", "torch", "deepspeed", "transformers", "accelerate")
# First version without the fault, and what the fault is.
_MENDED = {
    "torch": (
        ((2, 6), "weights_only=True of torch.load can be bypassed", "CVE-2025-32434"),
        ((2, 10), "weights_only=True of torch.load can be bypassed", "CVE-2026-24747"),
    )
}


def installed_versions() -> dict[str, str | None]:
    """Return the version of each package of interest, None where it is not installed."""
    return {package: _version(package) for package in PACKAGES}


def bad_versions(versions: Mapping[str, str | None]) -> Iterator[Advice]:
    """Installed versions with a known fault."""
    for package, faults in _MENDED.items():
        installed = versions.get(package)
        for mended, fault, name in faults:
            if installed and _numbers(installed) < mended:
                wanted = ".".join(map(str, mended))
                yield Advice(
                    rule="bad_version",
                    what=f"{package} {installed}: {fault} ({name})",
                    fix=f"pip install '{package}>={wanted}'",
                    link=f"https://nvd.nist.gov/vuln/detail/{name}",
                )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text.split("+")[0])[:3])
