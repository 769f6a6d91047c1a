"""Mistakes behind a mistake: each is reported, though what it is given is wrong already."""

from __future__ import annotations

from typing import Any

from torch.nn import functional

import tpcheck
from tests.model.planting import faulty
from tpcheck import Topology

_FIRST, _NORM = "model.layers.0.self_attn.o_proj", "model.layers.1.post_attention_layernorm"
_COLUMN, _WEIGHT = "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj.weight"


def four_mistakes(candidate: Any, rank: Any) -> None:
    row, column = candidate.module.get_submodule(_FIRST), candidate.module.get_submodule(_COLUMN)
    row.forward = lambda hidden: functional.linear(hidden, row.weight)
    column.forward = lambda hidden: functional.linear(hidden, column.weight)  # its input gradient is not reduced
    if rank.rank == 1:
        candidate.module.get_submodule(_NORM).variance_epsilon *= 100
    candidate.module.get_parameter(_WEIGHT).register_hook(lambda gradient: gradient * 2)


def test_four_mistakes_in_one_model_are_four_findings() -> None:
    report = tpcheck.verify_family(
        "llama", topology=Topology(tp=2), backend=faulty(four_mistakes), steps=1, replays=4, timeout=120
    )
    found = {
        (finding.check, finding.where.get("parameter") or finding.where["module"], finding.cause)
        for finding in report.findings
        if finding.check in ("outputs_match_reference", "gradients_match_reference")
    }
    assert found == {
        ("outputs_match_reference", _FIRST, "missing_reduce"),
        ("outputs_match_reference", _NORM, None),
        ("gradients_match_reference", _COLUMN, "missing_reduce"),
        ("gradients_match_reference", _WEIGHT, "gradient_scaled"),
    }
    assert "compared with what its own inputs and weights give" in report.to_text()
