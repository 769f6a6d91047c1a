"""Importing tpcheck loads nothing heavy, and exports what it says."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tpcheck

HEAVY = ("torch", "transformers", "deepspeed")


def loaded_by(statement: str) -> set[str]:
    program = f"{statement}\nimport sys\nprint(*({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import tpcheck",
        "import tpcheck.pytest_plugin",
        "import tpcheck.cli",
        "import tpcheck.families, tpcheck.families.rules, tpcheck.families.settings",
        "import tpcheck.core.findings, tpcheck.core.causes, tpcheck.numerics.evidence",
        "import tpcheck.report",
        "import tpcheck.model.verify, tpcheck.lab.matrix",
        "import tpcheck.doctor.diagnosis",
        "from tpcheck import Topology, UsageError, Report, Finding, RankFailure",
        "from tpcheck import spawn, attach, World, Rank",
    ],
)
def test_importing_loads_neither_torch_nor_transformers_nor_deepspeed(statement: str) -> None:
    assert loaded_by(statement) == set()


def test_the_probe_can_fail() -> None:
    pytest.importorskip("torch")
    assert loaded_by("import torch") == {"torch"}


@pytest.mark.parametrize("name", tpcheck.__all__)
def test_every_exported_name_is_there(name: str) -> None:
    assert getattr(tpcheck, name) is not None
    assert name in dir(tpcheck)


def test_the_exported_names_are_the_public_contract() -> None:
    contract = {
        *("Topology", "World", "Rank", "spawn", "attach", "verify", "verify_family", "Report", "Finding"),
        *("watch", "check_batch", "watch_model", "TpcheckCallback"),
        *("TpcheckError", "UsageError", "Mismatch", "BatchMismatch", "UnevenBatches"),
        *("RankFailure", "RankOutcome", "BackendError", "CheckpointError", "verify_checkpoint"),
        *("record", "compare_traces", "guard"),
    }
    assert set(tpcheck.__all__) == contract


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tpcheck' has no attribute 'verfy'"):
        tpcheck.verfy  # noqa: B018
