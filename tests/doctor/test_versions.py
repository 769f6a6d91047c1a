"""Versions with known faults are reported with the version that fixes them."""

from __future__ import annotations

import pytest

from tpcheck.doctor.diagnosis import bad_versions, diagnose


@pytest.mark.parametrize(
    ("version", "faults"),
    [
        ("2.5.1", ["CVE-2025-32434", "CVE-2026-24747"]),
        ("2.6.0+cpu", ["CVE-2026-24747"]),
        ("2.9.1", ["CVE-2026-24747"]),
        ("2.10.0", []),
        ("2.13.0+cu130", []),
        (None, []),
    ],
)
def test_versions_of_torch_with_a_bypass_of_weights_only(version: str | None, faults: list[str]) -> None:
    advice = list(bad_versions({"torch": version}))
    assert [one.what.split("(")[-1].rstrip(")") for one in advice] == faults
    assert all(one.fix and one.link for one in advice)


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpcheck.doctor.diagnosis.PACKAGES", ("pytest", "no-such-package"))
    versions = diagnose().versions
    assert versions["pytest"]
    assert versions["no-such-package"] is None


def test_a_diagnosis_lists_the_devices() -> None:
    diagnosis = diagnose({"gradient_clipping": 0})
    assert "CPU cores" in diagnosis.devices[0]
    assert "tensor_parallelism_is_off" in {advice.rule for advice in diagnosis.advice}
