"""At a low precision, modules are held against the reference one by one, where a whole pass drowns in rounding."""

from __future__ import annotations

from typing import Any

import tpcheck
from tests.verification.planting import faulty
from tpcheck import Topology

_LAYERS = 8
_WRONG = f"model.layers.{_LAYERS - 1}.self_attn.o_proj"


def a_little_too_large(candidate: Any, rank: Any) -> None:
    candidate.module.get_submodule(_WRONG).register_forward_hook(lambda module, args, output: output * 1.12)


def test_a_small_error_deep_in_a_model_is_found_where_it_is_made() -> None:
    report = tpcheck.verify_family(
        "llama",
        topology=Topology(tp=2),
        backend=faulty(a_little_too_large),
        dtype="bfloat16",
        zero_stage=1,
        steps=1,
        settings={"num_hidden_layers": _LAYERS},
        timeout=120,
    )
    first = report.findings[0]
    assert first.where["module"] == _WRONG
    assert "each module fed the reference's inputs" in report.to_text()
    others = {check.check: check.worst_margin for check in report.verdict.checks if check.check != first.check}
    assert max(others.values()) < 1  # the whole pass shows nothing
