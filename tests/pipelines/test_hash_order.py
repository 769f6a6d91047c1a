"""The order of a set of strings is another one in every process, unless PYTHONHASHSEED says otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
import tpcheck
from tests.pipelines.odd import from_a_set
topology = tpcheck.Topology(tp=2)
rank = tpcheck.attach(topology)
try:
    list(tpcheck.watch(from_a_set(rank, ordered={ordered}), topology=topology, timeout=20))
    found = None
except tpcheck.BatchMismatch as mismatch:
    found = mismatch.report.findings[0]
if rank.rank == 0:
    sys.stdout.write(json.dumps(found and [found.cause, dict(found.evidence)]))
"""


def found_under_torchrun(folder: Path, ordered: bool, **env: str) -> Any:
    script = folder / "train.py"
    script.write_text(SCRIPT.format(ordered=ordered))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    environ |= {"PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_words_in_the_order_of_a_set_differ(tmp_path: Path) -> None:
    cause, evidence = found_under_torchrun(tmp_path, ordered=False)
    assert cause == "order_differs"
    assert (evidence["dataset_lists_in_another_order"], evidence["hash_differs"]) == ("names", True)
    assert evidence["PYTHONHASHSEED"] == "unset"
    assert "PYTHONHASHSEED" in evidence["advice"]


@pytest.mark.parametrize(("ordered", "env"), [(True, {}), (False, {"PYTHONHASHSEED": "0"})])
def test_after_either_advised_change_it_is_clean(tmp_path: Path, ordered: bool, env: dict[str, str]) -> None:
    assert found_under_torchrun(tmp_path, ordered, **env) is None
