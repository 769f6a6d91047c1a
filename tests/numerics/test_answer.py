"""What the checks say of hand-made evidence: all that is wrong is named, and accounts for what follows from it."""

from __future__ import annotations

import torch

from tpcheck import Topology
from tpcheck.backends.layout import Layout
from tpcheck.core.findings import Finding
from tpcheck.core.placement import Replicate
from tpcheck.numerics.answer import CheckAnswer, GroupAnswer, start_answer, verdict
from tpcheck.numerics.evidence import Evidence, RankFacts
from tpcheck.numerics.tolerance import Tolerance

NAMES = [f"layers.{number}.weight" for number in range(20)]


def evidence_of_wrong_weights(digests: list[dict[tuple[str, str], str]]) -> Evidence:
    """Return evidence in which both ranks hold the same wrong weights in all layers."""
    generator = torch.Generator().manual_seed(0)
    expected, wrong = (
        {name: torch.randn(3, 4, generator=generator, dtype=torch.float64) for name in NAMES} for _ in range(2)
    )
    return Evidence(
        topology=Topology(tp=2),
        dp_rank=0,
        dtype="float64",
        initial=expected,
        initial_parts=(wrong, wrong),
        layouts={name: Layout.placed((3, 4), Replicate(), 2) for name in NAMES},
        reference=(),
        candidate=(),
        buffers=("layers.19.scale",),
        facts=tuple(RankFacts({}, (of_rank,)) for of_rank in digests),
        tolerance=Tolerance(2.2e-16, 8, {}),
    )


def test_every_wrong_weight_is_named_and_accounts_for_its_module() -> None:
    buffer = ("buffer", "layers.19.scale")
    evidence = evidence_of_wrong_weights([{buffer: "a"}, {buffer: "b"}])
    answer = start_answer(evidence, ["weights_match_reference", "replicas_agree"])
    weights, replicas = (finding for one in answer.answers for finding in one.findings)
    assert [weights.where["parameter"], *weights.evidence["also"]] == NAMES
    assert replicas.where["module"] == "layers.19"
    assert replicas.evidence["follows_from"] == "weights_match_reference"


def test_every_replica_that_differs_is_named_with_its_kind() -> None:
    items = [(kind, name) for name in NAMES for kind in ("parameter", "buffer")]
    ranks: list[dict[tuple[str, str], str]] = [dict.fromkeys(items, rank) for rank in ("a", "b")]
    evidence = evidence_of_wrong_weights(ranks)
    (finding,) = start_answer(evidence, ["replicas_agree"]).answers[0].findings
    assert finding.evidence["count_differing"] == 1 + len(finding.evidence["also"]) == 20
    assert finding.evidence["also"] == [{"kind": "parameter", "name": name} for name in NAMES[1:]]


def test_what_several_groups_name_beside_one_place_is_put_together() -> None:
    def of_group(*also: str) -> GroupAnswer:
        where = {"phase": "start", "parameter": "a.weight", "ranks": [0]}
        finding = Finding("weights_match_reference", where, 1.0, 0.0, evidence={"also": list(also)})
        return GroupAnswer((CheckAnswer("weights_match_reference", -1, {}, (finding,), {}),))

    groups = [of_group("b.weight", "c.weight"), of_group("c.weight", "d.weight")]
    found = verdict(groups, steps=0, subject={}, environment={}, again=None, seconds=0.0).findings
    assert [finding.evidence["also"] for finding in found] == [["b.weight", "c.weight", "d.weight"]]
